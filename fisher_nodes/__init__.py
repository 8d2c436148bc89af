"""Merge fine-tuned Transformers with Fisher mask nodes."""

__version__ = "0.1.0"

from importlib import import_module

# Where each public name lives. Modules are imported when a name is first used, so `fisher-nodes --help` needs no torch.
_PLACES = {
    'app.explorer': ['explore'],
    'tasks.evaluation': ['evaluate', 'predict'],
    'tasks.finetuning': ['finetune'],
    'core.fisher': ['MaskFisher', 'mask_fisher'],
    'methods.regmean': ['Grams', 'linear_grams'],
    'experiment.grid': ['reproduce'],
    'core.schemes': ['SCHEMES'],
    'merging.run': ['METHODS', 'Source', 'merge'],
    'methods.full_fisher': ['ParameterFisher', 'parameter_fisher'],
    'merging.recipe': ['read_recipe', 'run_recipe'],
    'merging.merged': ['Merged'],
    'merging.streaming': ['merge_files'],
    'tasks.tasks': ['GLUE', 'Task', 'load_task'],
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}
__all__ = sorted(_MODULES)

def __getattr__(name):
    if name not in _MODULES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_MODULES[name]}', __name__), name)

def __dir__(): return [*globals(), *__all__]
