"""Merge fine-tuned Transformers with Fisher mask nodes."""

__version__ = "0.1.0"

from importlib import import_module

# Where each public name lives. Modules are imported when a name is first used, so `fisher-nodes --help` needs no torch.
_PLACES = {
    'app.explorer': ['explore'],
    'engine.measure': ['MaskFisher', 'ParameterFisher', 'Grams', 'linear_grams', 'mask_fisher', 'parameter_fisher'],
    'engine.models': ['ModelReference', 'Source'],
    'engine.optimizer': ['optimizer_fisher', 'optimizer_mask_fisher'],
    'experiment.compare': ['compare'],
    'experiment.grid': ['reproduce'],
    'merging.merged': ['Merged'],
    'merging.recipe': ['read_recipe'],
    'merging.request': ['METHODS', 'MergeRequest'],
    'merging.run': ['merge', 'merge_files', 'run_recipe'],
    'methods.method': ['Job', 'Rule', 'merge_method'],
    'core.describe': ['describe'],
    'core.prove': ['prove'],
    'core.schemes': ['SCHEMES'],
    'plugins.trainer': ['FisherCallback'],
    'tasks.evaluation': ['evaluate', 'predict'],
    'tasks.finetuning': ['finetune'],
    'tasks.tasks': ['GLUE', 'Task', 'load_task'],
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}
__all__ = sorted(_MODULES)

def __getattr__(name):
    if name not in _MODULES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_MODULES[name]}', __name__), name)

def __dir__(): return [*globals(), *__all__]
