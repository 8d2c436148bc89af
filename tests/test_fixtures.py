"""What version 0.1 gave, bit for bit: numbers, files and results that its own code wrote (`fixtures/make.py`)."""
import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import fisher_nodes
from fisher_nodes.experiment.results import load_results

HERE = Path(__file__).parent/'fixtures'
sys.path.insert(0, str(HERE))
import make  # noqa: E402

OLD = HERE/'v01'
MADE = json.loads((OLD/'grid.json').read_text())
PROCESSOR = next((l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')), '') if Path('/proc/cpuinfo').exists() else ''
SAME = (MADE['torch'], MADE['cpu'], MADE.get('processor')) == (torch.__version__, torch.backends.cpu.get_cpu_capability(), PROCESSOR) # two processors of one capability can differ in the last bits
FILES = [f'{f}-{make.name(d)}' for f, dtypes in make.FAMILIES.items() for d in dtypes]

ELSEWHERE = {torch.float32: dict(rtol=2e-3, atol=1e-11), torch.float64: dict(rtol=1e-9, atol=1e-25)} # less is rounding: keys' biases have no gradient

def equal(name, got, want):
    "Bit for bit where the fixtures' torch and kind of CPU are at hand; elsewhere the last bits are the CPU's."
    assert got.dtype == want.dtype and got.shape == want.shape, name
    if SAME: assert torch.equal(got, want), name
    else: assert_close(got, want, **ELSEWHERE[got.dtype], msg=lambda m: f'{name}: {m}')

@pytest.fixture(scope='module')
def now(): return dict(make.tensors(fisher_nodes))

def ordered(family):
    "Whether this transformers has a body's parameters in the order in which the fixtures' random weights were drawn."
    names = [n for n, _ in make.tiny(family).base_model.named_parameters()]
    return names.index('embeddings.position_embeddings.weight') == dict(bert=1, roberta=4)[family]

@pytest.mark.parametrize('file', FILES)
def test_numbers(now, file):
    if not ordered(file.split('-')[0]): pytest.skip('random weights of the fixtures are drawn in the order of parameters, which this transformers has otherwise')
    want = load_file(OLD/f'{file}.safetensors')
    assert now[file].keys() == want.keys()
    for k, v in want.items(): equal(k, now[file][k], v)

def weights(folder):
    "Saved weights by their bytes; a header with several notes has no fixed order, so a Fisher's tensors are compared instead."
    return {o.relative_to(folder).as_posix(): hashlib.sha256(o.read_bytes()).hexdigest() for o in sorted(folder.rglob('*/model*.safetensors'))}

def test_folders(tmp_path):
    "The weights of saved models, by their bytes, and every other file but for versions and fingerprints of time."
    make.folders(tmp_path/'new', fisher_nodes)
    if not SAME: pytest.skip('hashes of files hold for the CPU and the torch of the fixtures; numbers are compared above')
    assert weights(tmp_path/'new') == weights(OLD)
    for o in sorted(OLD.glob('merged*')):
        new = {p.relative_to(tmp_path/'new'/o.name) for p in (tmp_path/'new'/o.name).rglob('*') if p.is_file()}
        assert new == {p.relative_to(o) for p in o.rglob('*') if p.is_file()}

@pytest.mark.parametrize('task', ['first', 'second'])
def test_a_saved_fisher_loads(tmp_path, task):
    found, want = fisher_nodes.MaskFisher.load(OLD/f'{task}.fisher.safetensors'), load_file(OLD/f'{task}.fisher.safetensors')
    for k in ('heads', 'rows'):
        for i, v in enumerate(getattr(found, k)): assert torch.equal(v, want[f'{k}.{i}'])
    assert found.num_examples == 10 and found.meta['variant'] == 'paper'
    found.save(tmp_path/'again')
    assert load_file(tmp_path/'again').keys() == want.keys()

@pytest.mark.parametrize('folder', ['merged', 'merged-files'])
def test_a_saved_merge_loads_and_its_recipe_repeats(tmp_path, folder):
    shutil.copytree(OLD, tmp_path/'old')
    for o in ('first', 'second'): # Fishers lay beside the folders when they were merged
        assert (tmp_path/'old'/f'{o}.fisher.safetensors').is_file()
    merged = fisher_nodes.Merged.from_pretrained(tmp_path/'old'/folder)
    assert list(merged) == ['first', 'second'] and merged.report['method'] in fisher_nodes.METHODS
    out = fisher_nodes.run_recipe(tmp_path/'old'/folder/'recipe.yml', tmp_path/'again', progress=False)
    again = fisher_nodes.Merged.from_pretrained(out)
    for (k, a), b in zip(merged.body.state_dict().items(), again.body.state_dict().values()): equal(k, b, a)

@pytest.fixture
def glue(monkeypatch): monkeypatch.setenv('FISHER_NODES_GLUE', 'set by the grid')

def test_grid(tmp_path, glue):
    scores = make.grid(tmp_path/'work', fisher_nodes, fisher_nodes.GLUE, tmp_path/'out')
    assert scores.keys() == MADE['scores'].keys()
    for file, groups in MADE['scores'].items():
        for g, want in groups.items(): assert scores[file][g] == want, (file, g)

def test_an_old_grid_is_read(tmp_path):
    "Results of 0.1 make the same table."
    shutil.copytree(OLD/'results', tmp_path/'results')
    table = load_results(tmp_path/'results')
    assert len(table) > 100 and set(table.name) == set(make.GRID['methods'])
