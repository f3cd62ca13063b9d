"""Tasks of the language-model evaluation harness (lm-eval): accuracy of a model, and the share that a compressed one retains.

Four multiple-choice tasks are bundled and need no hub. Every other task of lm-eval goes through the same function. A linear probe
classifies labelled sentences by the model's last hidden state.
"""

from .probe import linear_probe
from .run import BUNDLED_TASKS, TaskResult, evaluate_tasks
from .scores import accuracy_retained, task_rows
