"""Recipes of `program` Scaffolds: text classifiers that learn from a task's train file and label its test file.

A `ProgramRecipe` is a point in a search space over character n-gram TF-IDF features and a linear, Bayesian or
nearest-neighbour classifier from scikit-learn. `render_program` writes it as a stand-alone `agent.py`, run as
`python agent.py --dataset_dir DIR --working_dir DIR`: it reads `train.csv` (id, text, label) and `test.csv` (id, text)
and writes `submission.csv` (id, label), one row a test row.

What the program is *not* given: any label of `test.csv`. It fits on the whole of `train.csv`, so that a program whose
settings were chosen on a part of train is refitted on all of it without a change.

Time: every recipe of the space fits 5,300 documents of 450 characters in a minute on two cores, which is why the
feature counts stop at 80,000, and below 1 GiB, which is why the centroids are sparse products and not scikit-learn's
`NearestCentroid` (it makes the matrix dense: 7 GB at that size).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from agents.decision import ScaffoldDraft
from agents.solve_template import assemble
from tasks.contract import TaskSpec


class Classifier(StrEnum):
    """What learns from the features."""

    NEIGHBOURS = "neighbours"
    CENTROID = "centroid"
    NAIVE_BAYES = "naive_bayes"
    LOGISTIC = "logistic"
    SGD_HINGE = "sgd_hinge"
    SGD_HUBER = "sgd_huber"
    LINEAR_SVC = "linear_svc"


class Analyzer(StrEnum):
    """What a feature is made of."""

    CHAR = "char"
    CHAR_WB = "char_wb"
    WORD = "word"


_NAMES = {
    Classifier.NEIGHBOURS: "five nearest neighbours",
    Classifier.CENTROID: "nearest class centroid",
    Classifier.NAIVE_BAYES: "complement naive Bayes",
    Classifier.LOGISTIC: "logistic regression",
    Classifier.SGD_HINGE: "linear SVM by SGD",
    Classifier.SGD_HUBER: "linear model with Huber loss by SGD",
    Classifier.LINEAR_SVC: "linear SVM",
}

_SIMPLE = frozenset({Classifier.NEIGHBOURS, Classifier.CENTROID, Classifier.NAIVE_BAYES})
"""Classifiers without a regularisation strength and without class weights."""


class ProgramRecipe(BaseModel):
    """One text classifier. Two recipes that would write the same Scaffold have equal `canonical()` forms."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["program"] = "program"
    analyzer: Analyzer = Analyzer.CHAR
    ngrams: str = "1-2"
    min_df: int = 2
    max_features: int = 40_000
    sublinear: bool = True
    truncate: int = 0
    classifier: Classifier = Classifier.NAIVE_BAYES
    strength: float = 1.0
    balanced: bool = False

    def canonical(self) -> ProgramRecipe:
        """The same recipe with choices that have no effect set to their defaults."""
        change: dict[str, object] = {}
        if self.classifier in _SIMPLE:
            change["strength"] = 1.0
            change["balanced"] = False
        return self.model_copy(update=change)

    def describe(self) -> str:
        """One line for a reader, e.g. `linear SVM (C 4) on TF-IDF of char 1-2-grams, 40000 features`."""
        name = _NAMES[self.classifier]
        if self.classifier not in _SIMPLE:
            name += f" (C {self.strength:g}{', balanced classes' if self.balanced else ''})"
        log = "" if self.sublinear else ", plain counts"
        cut = f", first {self.truncate} characters" if self.truncate else ""
        features = f"{self.analyzer} {self.ngrams}-grams (in {self.min_df}+ texts, at most {self.max_features})"
        return f"{name} on TF-IDF of {features}{log}{cut}"

    @property
    def asks_often(self) -> bool:
        """Never: these programs call no model."""
        return False

    def price(self) -> float:
        """What the recipe's cost is worth in mean reward: a trifle for features, to choose the smaller of equals."""
        return 1e-9 * self.max_features


class ProgramSpace:
    """The recipes that make sense for a `program` task over labelled texts."""

    def __init__(self, task: TaskSpec) -> None:
        self.task = task
        self.axes: dict[str, tuple[str | int | float | bool, ...]] = {
            "analyzer": tuple(a.value for a in Analyzer),
            "ngrams": ("1-1", "1-2", "1-3", "2-3", "2-4"),
            "min_df": (1, 2, 3),
            "max_features": (20_000, 40_000, 80_000),
            "sublinear": (True, False),
            "truncate": (0, 400, 800),
            "classifier": tuple(c.value for c in Classifier),
            "strength": (0.3, 1.0, 4.0, 10.0),
            "balanced": (False, True),
        }

    def build(self, choices: Mapping[str, JsonValue]) -> ProgramRecipe:
        """The canonical recipe of one value an axis.

        Raises:
            pydantic.ValidationError: a value that no recipe can have.
        """
        return ProgramRecipe.model_validate(choices).canonical()

    def first(self) -> ProgramRecipe:
        """The plain first Scaffold: TF-IDF with complement naive Bayes, the usual quick baseline for texts."""
        return self.build({})

    def openings(self) -> Sequence[ProgramRecipe]:
        """The classifiers that are usually strong on many sparse features, at ordinary settings."""
        ways: tuple[dict[str, JsonValue], ...] = (
            {"classifier": "linear_svc", "strength": 4.0},
            {"classifier": "sgd_huber", "strength": 1.0},
        )
        return [self.build(way) for way in ways]


MAIN = """
def read(path, column):
    with open(path, encoding="utf-8", newline="") as file:
        return [row[column] for row in csv.DictReader(file)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset_dir", type=Path, required=True)
    parser.add_argument("--working_dir", type=Path, required=True)
    places = parser.parse_args()
    train, test = places.dataset_dir / "train.csv", places.dataset_dir / "test.csv"
    predicted = classify(read(train, "text"), read(train, "label"), read(test, "text"))
    places.working_dir.mkdir(parents=True, exist_ok=True)
    with open(places.working_dir / "submission.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label"])
        writer.writerows(zip(read(test, "id"), predicted))


if __name__ == "__main__":
    csv.field_size_limit(10_000_000)
    main()
"""

FEATURES = '''
def features(train_texts, test_texts):
    """TF-IDF matrices of both, the vocabulary and the weights from train alone."""
    cut = TRUNCATE or None
    vectorizer = TfidfVectorizer(**TFIDF, dtype=np.float32)
    return vectorizer.fit_transform([t[:cut] for t in train_texts]), vectorizer.transform([t[:cut] for t in test_texts])
'''

SIMILARITY = '''
def similarities(x_train, labels, x_test):
    """Cosine of each test text to each class's mean direction; classes in sorted order."""
    classes, of_row = np.unique(labels, return_inverse=True)
    membership = csr_matrix((np.ones(len(of_row)), (of_row, np.arange(len(of_row)))))
    centroids = normalize(membership @ x_train)
    return classes, (x_test @ centroids.T).toarray()
'''

CLASSIFY_CENTROID = """
def classify(train_texts, labels, test_texts):
    x_train, x_test = features(train_texts, test_texts)
    classes, near = similarities(x_train, labels, x_test)
    return classes[near.argmax(axis=1)]
"""

CLASSIFY = """
def classify(train_texts, labels, test_texts):
    x_train, x_test = features(train_texts, test_texts)
    return MODEL.fit(x_train, labels).predict(x_test)
"""


def render_program(recipe: ProgramRecipe, task: TaskSpec) -> ScaffoldDraft:
    """Write a recipe as `agent.py`.

    Args:
        recipe: the choices; brought to its canonical form first.
        task: named in the file's first line.

    Returns:
        A draft of one file that needs numpy, scipy and scikit-learn. Same arguments, same text.
    """
    recipe = recipe.canonical()
    low, high = (int(n) for n in recipe.ngrams.split("-"))
    tfidf = {
        "analyzer": recipe.analyzer.value,
        "ngram_range": (low, high),
        "min_df": recipe.min_df,
        "max_features": recipe.max_features,
        "sublinear_tf": recipe.sublinear,
    }
    centroid = recipe.classifier is Classifier.CENTROID
    imports = ["import argparse", "import csv", "from pathlib import Path", "", "import numpy as np"]
    if centroid:
        imports.append("from scipy.sparse import csr_matrix")
    imports.append("from sklearn.feature_extraction.text import TfidfVectorizer")
    constants = [f"TFIDF = {tfidf!r}", f"TRUNCATE = {recipe.truncate}  # characters of a text; 0 is all of it"]
    if not centroid:
        module, call = _model(recipe)
        imports.append(module)
        constants.append(f"MODEL = {call}")
    if centroid:
        imports.append("from sklearn.preprocessing import normalize")
    imports[5:] = sorted(imports[5:])

    pieces = [FEATURES]
    if centroid:
        pieces.append(SIMILARITY)
    pieces.append(CLASSIFY_CENTROID if centroid else CLASSIFY)
    pieces.append(MAIN)
    note = recipe.describe()
    text = assemble(f"{task.title}: {note}.", imports, constants, pieces)
    return ScaffoldDraft(files={"agent.py": text}, note=note, recipe=recipe.model_dump(mode="json"))


def _model(recipe: ProgramRecipe) -> tuple[str, str]:
    """The import line and the constructor call of the recipe's classifier.

    `strength` is LinearSVC's C; SGD's penalty falls as it grows.
    """
    weight = ', class_weight="balanced"' if recipe.balanced else ""
    alpha = 1e-4 / recipe.strength
    match recipe.classifier:
        case Classifier.NEIGHBOURS:
            call = 'KNeighborsClassifier(n_neighbors=5, weights="distance", metric="cosine")'
            return "from sklearn.neighbors import KNeighborsClassifier", call
        case Classifier.NAIVE_BAYES:
            return "from sklearn.naive_bayes import ComplementNB", "ComplementNB(alpha=0.3)"
        case Classifier.LOGISTIC:
            call = f'SGDClassifier(loss="log_loss", alpha={alpha / 4:.3g}, random_state=0, n_jobs=2{weight})'
            return "from sklearn.linear_model import SGDClassifier", call
        case Classifier.SGD_HINGE:
            call = f"SGDClassifier(alpha={alpha:.3g}, random_state=0, n_jobs=2{weight})"
            return "from sklearn.linear_model import SGDClassifier", call
        case Classifier.SGD_HUBER:
            call = f'SGDClassifier(loss="modified_huber", alpha={alpha:.3g}, random_state=0, n_jobs=2{weight})'
            return "from sklearn.linear_model import SGDClassifier", call
        case _:
            return "from sklearn.svm import LinearSVC", f"LinearSVC(C={recipe.strength:g}{weight})"
