"""Write fisher_nodes/__init__.pyi, from which editors complete `from fisher_nodes import …`: the package itself imports a module when a name is first used."""
from pathlib import Path

from fisher_nodes import _PLACES

STUB = Path(__file__).resolve().parent.parent/'fisher_nodes'/'__init__.pyi'

def stub()->str:
    "A line for each public name, by module; `as` the same name says that it is public."
    lines = [f'from .{module} import {name} as {name}' for module,names in sorted(_PLACES.items()) for name in sorted(names)]
    return '\n'.join(['# Written by tools/make_stub.py; `make export` runs it.', *lines, '', '__version__: str', '__all__: list[str]', ''])

if __name__=='__main__': STUB.write_text(stub(), encoding='utf-8')
