# Written by tools/make_stub.py; `make export` runs it.
from .app.explorer import explore as explore
from .core.fisher import MaskFisher as MaskFisher
from .core.fisher import mask_fisher as mask_fisher
from .core.schemes import SCHEMES as SCHEMES
from .experiment.grid import reproduce as reproduce
from .merging.merged import Merged as Merged
from .merging.recipe import read_recipe as read_recipe
from .merging.recipe import run_recipe as run_recipe
from .merging.run import METHODS as METHODS
from .merging.run import Source as Source
from .merging.run import merge as merge
from .merging.streaming import merge_files as merge_files
from .methods.full_fisher import ParameterFisher as ParameterFisher
from .methods.full_fisher import parameter_fisher as parameter_fisher
from .methods.regmean import Grams as Grams
from .methods.regmean import linear_grams as linear_grams
from .tasks.evaluation import evaluate as evaluate
from .tasks.evaluation import predict as predict
from .tasks.finetuning import finetune as finetune
from .tasks.tasks import GLUE as GLUE
from .tasks.tasks import Task as Task
from .tasks.tasks import load_task as load_task

__version__: str
__all__: list[str]
