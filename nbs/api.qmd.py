"""---
title: API
description: Every public name of every module, what it does, and where it is explained
---"""
import ast
import re

from fastcore.basics import listify
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, patch_name

lookup = NbdevLookup()
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)

def first_line(o)->str:
    "Of the docstring, without references to what another page numbers."
    return re.sub(r' \(@[\w-]+\)', '', (ast.get_docstring(o) or '').partition('\n')[0]).replace('|', r'\|')

def definitions(tree)->dict: # name to first line of its docstring
    "Functions, classes and methods, those that are patched in too."
    found = {name: first_line(o) for o in tree.body if isinstance(o, DEFINITIONS) for name in listify(patch_name(o))}
    classes = [o for o in tree.body if isinstance(o, ast.ClassDef)]
    return found | {f'{c.name}.{o.name}': first_line(o) for c in classes for o in c.body if isinstance(o, DEFINITIONS)}

def constants(tree)->list[str]:
    targets = [o.targets[0] for o in tree.body if isinstance(o, ast.Assign)]
    return [o.id for o in targets if isinstance(o, ast.Name) and not o.id.startswith('_')]

def section(path)->str: # Markdown
    "The table of one module."
    text = path.read_text(encoding='utf-8')
    page, module, tree = re.search(r'edit: \S*?([\w.]+\.ipynb)', text)[1], path.stem, ast.parse(text)
    rows = [f'| [`{name}`]({lookup.doc(f"fisher_nodes.{module}.{name}")}) | {what} |' for name,what in sorted(definitions(tree).items())
            if not re.search(r'(^|\.)_', name)]
    more = ', '.join(f'`{o}`' for o in constants(tree))
    return '\n'.join([f'## {module}\n', f'[The page]({page}).' + (f' Constants: {more}.' if more else ''), '\n| name | what it does |\n|---|---|', *rows, ''])

modules = [o for o in get_config().lib_path.glob('*.py') if not o.name.startswith('_')]
print(*(section(o) for o in sorted(modules, key=lambda o: re.search(r'(\w+)\.ipynb', o.read_text(encoding='utf-8'))[1])), sep='\n')
