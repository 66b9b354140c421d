"""The linear baseline that results on LawBench stand beside: sublinear TF-IDF of characters 1-2, LinearSVC, C = 1.

sia eval lawbench --scaffold tasks/lawbench/reference/linear
"""

import argparse
import csv
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    folders = parser.parse_args()
    train, test = rows(folders.dataset_dir / "train.csv"), rows(folders.dataset_dir / "test.csv")
    model = make_pipeline(TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True), LinearSVC(C=1.0))
    model.fit([row["text"] for row in train], [row["label"] for row in train])
    labels = model.predict([row["text"] for row in test])
    with (folders.working_dir / "submission.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label"])
        writer.writerows(zip([row["id"] for row in test], labels, strict=True))


main()
