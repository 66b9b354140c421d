"""The weight lever: base models, the local inference engine, objectives and the trainer.

Importing the package loads nothing heavy. It asks OpenMP for passive waiting, unless the environment says otherwise:
sandboxed agents run on the same cores as the model, and a thread that spins while it waits for one that has been
descheduled costs a whole time slice for every matrix product (measured on 2 busy cores: 11 ms instead of 0.3 ms).
OpenMP reads the variable once, so it has to be set before torch is imported. It also keeps the model libraries from
asking a hub about names that happen to look like one of its models: every model here is a local folder.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
