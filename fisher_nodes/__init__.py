"""Merge fine-tuned Transformers with Fisher mask nodes."""

__version__ = "0.1.0"

from .evaluation import evaluate, predict
from .finetuning import finetune
from .fisher import MaskFisher, mask_fisher
from .mapping import SCHEMES
from .merger import METHODS, Merged, merge
from .tasks import GLUE, Task, load_task

__all__ = ['GLUE', 'METHODS', 'SCHEMES', 'MaskFisher', 'Merged', 'Task', 'evaluate', 'finetune', 'load_task', 'mask_fisher', 'merge', 'predict']
