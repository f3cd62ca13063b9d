"""Tasks of the language-model evaluation harness (lm-eval): accuracy of a model, and what of it a splice retains.

Four multiple-choice tasks are bundled and need no hub; every other task of lm-eval goes through the same function.
"""

from .run import BUNDLED_TASKS, TaskResult, evaluate_tasks
from .scores import Retained, accuracy_retained, task_rows
