# Written by tools/make_stub.py; `make export` runs it.
from .app.explorer import explore as explore
from .core.describe import describe as describe
from .core.prove import prove as prove
from .core.schemes import SCHEMES as SCHEMES
from .engine.measure import Grams as Grams
from .engine.measure import MaskFisher as MaskFisher
from .engine.measure import ParameterFisher as ParameterFisher
from .engine.measure import linear_grams as linear_grams
from .engine.measure import mask_fisher as mask_fisher
from .engine.measure import parameter_fisher as parameter_fisher
from .engine.models import ModelReference as ModelReference
from .engine.models import Source as Source
from .engine.optimizer import optimizer_fisher as optimizer_fisher
from .engine.optimizer import optimizer_mask_fisher as optimizer_mask_fisher
from .experiment.compare import compare as compare
from .experiment.grid import reproduce as reproduce
from .merging.merged import Merged as Merged
from .merging.recipe import read_recipe as read_recipe
from .merging.request import METHODS as METHODS
from .merging.request import MergeRequest as MergeRequest
from .merging.run import merge as merge
from .merging.run import merge_files as merge_files
from .merging.run import run_recipe as run_recipe
from .methods.method import Job as Job
from .methods.method import Rule as Rule
from .methods.method import merge_method as merge_method
from .plugins.trainer import FisherCallback as FisherCallback
from .tasks.evaluation import evaluate as evaluate
from .tasks.evaluation import predict as predict
from .tasks.finetuning import finetune as finetune
from .tasks.tasks import GLUE as GLUE
from .tasks.tasks import Task as Task
from .tasks.tasks import load_task as load_task

__version__: str
__all__: list[str]
