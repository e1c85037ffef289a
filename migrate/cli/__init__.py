"""The commands. Numpy's linear algebra is not used: its threads must not spin on our processors."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
