"""---
title: API
description: What you import from fisher_nodes, then every public name of every module, layer by layer
---"""
import ast
import re

from fastcore.basics import listify
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, patch_name

from fisher_nodes import _PLACES

lookup = NbdevLookup()
package = get_config().lib_path
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
LAYERS = dict( # each imports only from those above it here
    core='The formulas of the paper, on tensors.',
    methods='One page, one registered method.',
    engine='Real models on real machines.',
    tasks='Data, metrics, fine-tuning, labels.',
    merging='One request, one run, what comes out.',
    experiment='Grids of merges, their results and pictures.',
    plugins='The methods in tools of others.',
    app='The command line, the demo, the explorer.')
CONSTANTS = dict( # the public names that can have no docstring
    GLUE='The GLUE tasks by name: columns, classes, metrics.',
    METHODS='The ways to merge by name: what each measures, whether it needs `base`, its options.',
    Source='The name of `ModelReference` in version 0.1.',
    SCHEMES="Which Fisher weights which role's parameters, by name.")

def first_line(o)->str:
    "Of the docstring, without references to what another page numbers."
    return re.sub(r' \(@[\w-]+\)', '', (ast.get_docstring(o) or '').partition('\n')[0]).replace('|', r'\|')

def definitions(tree)->dict: # name to first line of its docstring
    "Functions, classes, and methods that have a docstring, those that are patched in too; none that is private."
    found = {name: first_line(o) for o in tree.body if isinstance(o, DEFINITIONS) for name in listify(patch_name(o))}
    classes = [o for o in tree.body if isinstance(o, ast.ClassDef)]
    found |= {f'{c.name}.{o.name}': first_line(o) for c in classes for o in c.body if isinstance(o, DEFINITIONS) and ast.get_docstring(o)}
    return {name: what for name,what in found.items() if not re.search(r'(^|\.)_', name)}

def constants(tree)->list[str]:
    targets = [o.target if isinstance(o, ast.AnnAssign) else o.targets[0] for o in tree.body if isinstance(o, (ast.Assign, ast.AnnAssign))]
    return [o.id for o in targets if isinstance(o, ast.Name) and not o.id.startswith('_')]

def page(text:str)->str: # file below `nbs/`
    return re.search(r'edit: \S*?nbs/(\S+?\.ipynb)', text)[1]

def table(rows:list)->str: # Markdown
    "Name, where it is explained, what it does."
    return '\n'.join(['| name | what it does |', '|---|---|', *(f'| [`{name}`]({where}) | {what} |' for name,where,what in rows), ''])

def section(module:str)->str: # Markdown
    tree, more = ast.parse(sources[module]), ', '.join(f'`{o}`' for o in constants(ast.parse(sources[module])))
    rows = [(name, lookup.doc(f'fisher_nodes.{module}.{name}'), what) for name,what in sorted(definitions(tree).items())]
    return f'### {module}\n\n[The page]({page(sources[module])}).' + (f' Constants: {more}.' if more else '') + f'\n\n{table(rows)}'

def layer(name:str)->str: # Markdown
    "Its modules, in the order of their pages."
    modules = sorted((o for o in sources if o.split('.')[0]==name), key=lambda o: page(sources[o]))
    return '\n'.join([f'## {name}\n\n{LAYERS[name]}\n', *map(section, modules)])

def homes()->dict: # public name to the module that defines it
    "A name may be imported from a module that completes it, such as one that gives it `save`."
    found = {n: m for m,text in sources.items() for n in (*constants(ast.parse(text)), *definitions(ast.parse(text)))}
    return {name: found.get(name, module) for module,names in _PLACES.items() for name in names}

def public()->str: # Markdown
    rows = []
    for name,module in homes().items():
        what = definitions(ast.parse(sources[module])) | CONSTANTS
        rows.append((name, lookup.doc(f'fisher_nodes.{module}.{name}') or page(sources[module]), what[name]))
    return '\n'.join(['## From the package itself {#sec-public}', '`from fisher_nodes import merge`, for instance.', '', table(sorted(rows, key=lambda o: o[0].lower()))])

sources = {'.'.join(o.relative_to(package).with_suffix('').parts): o.read_text(encoding='utf-8') for o in package.rglob('[!_]*.py')}
if new := {o.split('.')[0] for o in sources} - {*LAYERS}: raise ValueError(f'no layer of `LAYERS`: {", ".join(sorted(new))}')
print(public(), *map(layer, LAYERS), sep='\n')
