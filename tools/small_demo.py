"""Put the folder of the demo, as `_demo`, beside what a page or a test types.

python tools/small_demo.py FOLDER     # a link in FOLDER: to _demo, if `make demo` wrote it, else to _small

`_small` has the same files, of models trained on fewer and shorter rows: half a minute instead of three. It is made by whoever needs it
first, and again when the package has changed.
"""
import sys
from contextlib import redirect_stdout
from hashlib import sha256
from pathlib import Path

from filelock import FileLock
from fisher_nodes.app.demo import DEMO_FILES, demo

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(train_samples=400, test_samples=200, max_length=32)

def is_whole(folder:Path)->bool: return all((folder/o).exists() for o in DEMO_FILES)

def fingerprint()->str:
    "Of the package; exporting it anew changes nothing."
    sources = sorted((ROOT/'fisher_nodes').rglob('*.py'))
    return sha256(b''.join(o.read_bytes() for o in sources)).hexdigest()

def small_demo()->Path:
    "The small one, made if it is not there, or by another package."
    folder, made_by = ROOT/'_small', ROOT/'.small'
    with FileLock(ROOT/'.small.lock'):
        if not is_whole(folder) or not made_by.exists() or made_by.read_text()!=fingerprint():
            with redirect_stdout(sys.stderr): demo(folder, **SMALL, progress=False)
            made_by.write_text(fingerprint())
    return folder

def put_beside(folder:Path, small:bool=False)->Path:
    "The link; with `small` to the small one in any case."
    found = ROOT/'_demo' if is_whole(ROOT/'_demo') and not small else small_demo()
    (Path(folder)/'_demo').symlink_to(found, target_is_directory=True)
    return found

if __name__=='__main__': put_beside(Path(sys.argv[1]))
