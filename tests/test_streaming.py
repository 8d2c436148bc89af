"""`merge_files` against `merge(...).save_pretrained(...)`: the same files, the same refusals, less memory."""
import gc, json, os, subprocess, sys, threading
from pathlib import Path

import pytest
from conftest import SLOW
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, BertModel

from fisher_nodes import MaskFisher, Merged, ParameterFisher, Source, merge
from fisher_nodes.core import blocks
from fisher_nodes.merging import store as disk
from fisher_nodes.engine.fingerprints import TensorHash, hash_tensors, hash_weights
from fisher_nodes.methods.regmean import Grams
from fisher_nodes.engine.files import OutputExistsError
from fisher_nodes.methods.ties import elect_and_mean
from fisher_nodes.merging.run import merge_files
from fisher_nodes.merging.store import FileStore
from fisher_nodes.methods import method as methods
from fisher_nodes.methods.method import Rule
from reference import tiny

SIZE = dict(hidden=64, heads=4, intermediate=96, vocab=131) # blocks of eight rows, with many_blocks
BASED = 'task-arithmetic', 'ties', 'dare', 'wudi'
METHODS = 'average', 'mask-fisher', 'fisher', 'regmean', *BASED
OPTIONS = {'average': [{}], 'regmean': [{}, dict(off_diagonal=.5)], 'fisher': [{}, dict(normalise=True, floor=0)],
           'mask-fisher': [{}, dict(variant='released'), dict(scheme='with-value', variant='paper')],
           'task-arithmetic': [{}], 'ties': [{}, dict(density=.9)], 'dare': [{}, dict(density=.5, seed=7)], 'wudi': [dict(ridge=.1)]}
CASES = [(m, o) for m, options in OPTIONS.items() for o in options]

@pytest.fixture(autouse=True)
def many_blocks(monkeypatch): monkeypatch.setattr(blocks, 'BLOCK', 1500)

def make(folder, n=3, dtype=torch.float32, family='bert', shard='5GB', **kw):
    "`n` models and a base that they are near to, saved below `folder`."
    base, gen = tiny(family, seed=9, dtype=dtype, **SIZE | kw), torch.Generator().manual_seed(0)
    for i in range(n):
        model = tiny(family, 2+i, seed=i, dtype=dtype, **SIZE | kw)
        with torch.no_grad():
            for p, b in zip(model.base_model.parameters(), base.base_model.parameters()): p.copy_(b+.1*torch.randn(p.shape, generator=gen))
        model.save_pretrained(folder/'in'/f't{i}', max_shard_size=shard)
    base.save_pretrained(folder/'in'/'base')
    return {f't{i}': folder/'in'/f't{i}' for i in range(n)}

def load(place): return AutoModelForSequenceClassification.from_pretrained(place)

def linear(body): return {f'{n}.weight': m.in_features for n, m in body.named_modules() if isinstance(m, torch.nn.Linear)}

def measure(method, folders, folder, meta=True):
    "Made-up evidence of every model, as files."
    files, gen = {}, torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.rand(*shape, generator=gen)
    for t, place in folders.items():
        model = load(place)
        about = dict(num_examples=5, meta=dict(weight_hash=hash_weights(model), estimator='empirical', variant='paper') if meta else {})
        if method == 'mask-fisher': found = MaskFisher(rand(2, 4), rand(2, 96), **about)
        elif method == 'fisher': found = ParameterFisher({n: rand(*p.shape)*1e-5 for n, p in model.base_model.named_parameters()}, **about)
        elif method == 'regmean': found = Grams({n: (x := rand(60, d)).T @ x for n, d in linear(model.base_model).items()}, **about)
        else: return None
        files[t] = folder/f'{t}.{method}.safetensors'
        found.save(files[t])
    return files

def arguments(method, options, folders, folder):
    if options.get('variant') == 'released': fishers = measure(method, folders, folder, meta=False)
    else: fishers = measure(method, folders, folder)
    weights = {t: 1+i/3 for i, t in enumerate(folders)}
    return dict(fishers=fishers, method=method, weights=weights, **dict(base=folder/'in'/'base') if method in BASED else {}, **options)

def contents(folder):
    "Every file by its bytes."
    return {o.relative_to(folder).as_posix(): o.read_bytes() for o in sorted(Path(folder).rglob('*')) if o.is_file()}

def both(folders, folder, **kw):
    "The files of the merge in memory, and of that from file to file."
    merge(folders, progress=False, **kw).save_pretrained(folder/'a'/'out')
    return contents(folder/'a'/'out'), contents(merge_files(folders, out=folder/'b'/'out', progress=False, **kw))

def same(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if a[k] != b[k]] == []


# --- the same result --------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.bfloat16, *SLOW([torch.float32, torch.float16])], ids=str)
@pytest.mark.parametrize('method,options', CASES, ids=str)
def test_every_file_is_the_same(tmp_path, method, options, dtype):
    folders = make(tmp_path, dtype=dtype, shard='20KB' if dtype == torch.bfloat16 else '5GB')
    same(*both(folders, tmp_path, **arguments(method, options, folders, tmp_path)))

@pytest.mark.parametrize('method', METHODS)
def test_many_models_and_another_family(tmp_path, method):
    folders = make(tmp_path, 5, family='roberta', hidden=64, vocab=500)
    blocks.BLOCK = 1 << 16
    same(*both(folders, tmp_path, **arguments(method, {}, folders, tmp_path)))

def test_models_of_unlike_types_become_the_widest(tmp_path):
    folders = make(tmp_path)
    for t, dtype in dict(t0=torch.float16, t2=torch.bfloat16).items(): load(folders[t]).to(dtype).save_pretrained(folders[t])
    same(*both(folders, tmp_path, method='average'))
    assert load(tmp_path/'b'/'out'/'t0').dtype == torch.float32

def rewrite(folder, change):
    "Save the tensors of a model under changed names and types."
    old = load_file(folder/'model.safetensors')
    save_file(dict(change(n, t) for n, t in old.items()), folder/'model.safetensors', dict(format='pt'))

FORMS = {'without-prefix': lambda n, t: (n.removeprefix('bert.'), t),
         'gamma-and-beta': lambda n, t: (n.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'), t),
         'another-type-than-the-config-says': lambda n, t: (n, t.bfloat16()), 'positions': lambda n, t: (n, t)}

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('method', ['average', 'task-arithmetic'])
def test_files_of_other_forms(tmp_path, form, method):
    folders = make(tmp_path)
    for o in (folders['t1'], tmp_path/'in'/'base'): rewrite(o, FORMS[form])
    same(*both(folders, tmp_path, **arguments(method, {}, folders, tmp_path)))

@pytest.mark.parametrize('method', ['fisher', 'regmean', 'task-arithmetic'])
def test_evidence_and_base_from_memory(tmp_path, method):
    folders = make(tmp_path)
    kw = arguments(method, {}, folders, tmp_path)
    kind = dict(fisher=ParameterFisher, regmean=Grams).get(method)
    if kind: kw['fishers'] = {t: kind.load(o) for t, o in kw['fishers'].items()}
    else: kw['base'] = load(kw['base'])
    same(*both(folders, tmp_path, **kw))

def test_a_base_without_a_head(tmp_path):
    folders = make(tmp_path)
    BertModel.from_pretrained(tmp_path/'in'/'base').save_pretrained(tmp_path/'in'/'base')
    same(*both(folders, tmp_path, **arguments('ties', {}, folders, tmp_path)))

@pytest.mark.parametrize('threads', [1, 2, 5])
@pytest.mark.parametrize('block', [1, 300, 1 << 21])
def test_neither_threads_nor_blocks_matter(tmp_path, threads, block, monkeypatch):
    folders = make(tmp_path)
    want = contents(merge_files(folders, out=tmp_path/'a'/'out', **(kw := arguments('dare', {}, folders, tmp_path))))
    monkeypatch.setattr(blocks, 'BLOCK', block)
    same(want, contents(merge_files(folders, out=tmp_path/'b'/'out', threads=threads, **kw)))

def test_a_list_and_one_model(tmp_path):
    folders = make(tmp_path, 1)
    merge([folders['t0']], method='average').save_pretrained(tmp_path/'a'/'out')
    same(contents(tmp_path/'a'/'out'), contents(merge_files([folders['t0']], method='average', out=tmp_path/'b'/'out')))

def test_the_tasks_of_a_merge_are_sources(tmp_path):
    "Sharded, linked, and with the head in a file of its own."
    folders = make(tmp_path)
    first = merge_files(folders, method='average', out=tmp_path/'first', max_shard_size='20KB')
    again = {t: first/t for t in folders}
    same(*both(again, tmp_path, method='average'))
    a, b = Merged.from_pretrained(first).body.state_dict(), Merged.from_pretrained(tmp_path/'b'/'out').body.state_dict()
    for n, t in a.items(): assert_close(b[n], t, rtol=3e-7, atol=0)

def test_from_the_hub(tmp_path, monkeypatch):
    "A snapshot in the cache, by its id, with commit and card."
    folders, commit = make(tmp_path), '0'*40
    for t, o in folders.items():
        repo = tmp_path/'cache'/f'models--me--{t}'
        (repo/'refs').mkdir(parents=True); (repo/'refs'/'main').write_text(commit)
        (repo/'snapshots').mkdir(); os.symlink(o, repo/'snapshots'/commit)
    code = '''import sys; from fisher_nodes import merge; from fisher_nodes.merging.run import merge_files
names, out = [f'me/t{i}' for i in range(3)], sys.argv[1]
merge(names, method='average').save_pretrained(out+'/a/out')
merge_files(names, method='average', out=out+'/b/out')'''
    env = os.environ | dict(HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path/'cache'), HF_HUB_OFFLINE='1')
    subprocess.run([sys.executable, '-c', code, str(tmp_path)], env=env, check=True, capture_output=True)
    same(contents(tmp_path/'a'/'out'), contents(tmp_path/'b'/'out'))
    report = json.loads((tmp_path/'b'/'out'/'merge_report.json').read_text())
    assert report['tasks']['task1'] | dict(model='me/t1', hub=True, revision=commit) == report['tasks']['task1']


# --- shards -----------------------------------------------------------------------------------

def test_shards_are_linked_from_every_task(tmp_path):
    folders = make(tmp_path)
    whole, parts = (merge_files(folders, method='average', out=tmp_path/o, max_shard_size=s) for o, s in (('whole', '5GB'), ('parts', '20KB')))
    files = sorted(parts.glob('model-*.safetensors'))
    assert len(files) > 2 and not (parts/'model.safetensors').exists()
    for t in folders:
        names = sorted((parts/t).glob('model-*.safetensors'))
        assert len(names) == len(files)+1 and all(a.samefile(b) for a, b in zip(files, names))
        index = json.loads((parts/t/'model.safetensors.index.json').read_text())['weight_map']
        for name, f in index.items():
            with safe_open(parts/t/f, 'pt') as o: assert name in o.keys()
        a, b = load(whole/t).state_dict(), load(parts/t).state_dict()
        for n in a: assert_close(a[n], b[n], rtol=0, atol=0)
    assert BertModel.from_pretrained(parts).config.hidden_size == SIZE['hidden']
    a, b = (Merged.from_pretrained(o) for o in (whole, parts))
    assert a.recipe['result'] == b.recipe['result'] == hash_tensors(dict(b.body.named_parameters()) | {
        f'{t}/{n}': p for t, m in b.items() for n, p in m.named_parameters() if n.startswith('classifier')})

def test_one_file_replaces_several(tmp_path):
    folders = make(tmp_path)
    merge_files(folders, method='average', out=tmp_path/'out', max_shard_size='20KB')
    merge_files(folders, method='average', out=tmp_path/'out', overwrite=True)
    assert [o.name for o in (tmp_path/'out').glob('model*')] == ['model.safetensors']
    merge_files(folders, method='average', out=tmp_path/'out', overwrite=True, max_shard_size='20KB')
    assert not (tmp_path/'out'/'model.safetensors').exists()

def test_files_are_those_that_safetensors_writes(tmp_path):
    tensors = {f'{d}-{n}'.removeprefix('torch.'): torch.zeros(n).to(d) for n in (0, 1, 7) for d in disk.DTYPES.values()}
    tensors |= {'a "quoted" ü': torch.zeros(3, 2), 'none': torch.tensor(2.)}
    save_file(tensors, tmp_path/'theirs', dict(format='pt'))
    spots = disk.make_file(tmp_path/'ours', tensors)
    for n, t in tensors.items(): spots[n][...] = t
    assert (tmp_path/'ours').read_bytes() == (tmp_path/'theirs').read_bytes()


@pytest.mark.parametrize('threads', [0, -1, 1.5, 'x'])
def test_threads_are_counted(tmp_path, threads):
    with pytest.raises(ValueError, match='`threads` must be a whole number of at least 1'): merge_files(make(tmp_path), method='average', out=tmp_path/'out', threads=threads)
    assert not (tmp_path/'out').exists()

def test_a_merge_leaves_the_number_of_threads_of_torch_alone(tmp_path):
    "A thread started later works with as many as before."
    counts, look = [torch.get_num_threads()], lambda: counts.append(torch.get_num_threads())
    merge_files(make(tmp_path), method='average', out=tmp_path/'out', threads=3)
    look(); t = threading.Thread(target=look); t.start(); t.join()
    assert len(set(counts)) == 1

@pytest.mark.skipif(not Path('/proc/self/fd').exists(), reason='open files are counted in /proc, which only Linux has')
def test_few_files_stay_open_and_none_afterwards(tmp_path, monkeypatch):
    folders = make(tmp_path, n=3, shard='9KB')
    before, most = len(os.listdir('/proc/self/fd')), []
    blocks_of = FileStore.blocks
    def look(self, name, whole): most.append(len(os.listdir('/proc/self/fd'))); return blocks_of(self, name, whole)
    monkeypatch.setattr(FileStore, 'blocks', look)
    monkeypatch.setattr(disk, 'MOST_OPEN', 5)
    merge_files(folders, method='average', out=tmp_path/'few')
    assert max(most) <= before+5+5 and len(list((tmp_path/'in').rglob('*.safetensors'))) > 20
    monkeypatch.setattr(disk, 'MOST_OPEN', 64)
    merge_files(folders, method='average', out=tmp_path/'many')
    assert (tmp_path/'few'/'model.safetensors').read_bytes() == (tmp_path/'many'/'model.safetensors').read_bytes()
    gc.collect()
    assert len(os.listdir('/proc/self/fd')) <= before

def test_regmean_solves_with_the_threads_that_merge_has(tmp_path, monkeypatch):
    "The last bits of a large solution depend on their number."
    monkeypatch.setattr(blocks, 'BLOCK', 1 << 22)
    threads = torch.get_num_threads()
    folders = make(tmp_path, n=2, hidden=768, heads=12, intermediate=1536, vocab=64, layers=1)
    grams = {t: Grams({n: (x := torch.randn(3000, d)+.5).T@x for n, d in linear(load(o).base_model).items()}) for t, o in folders.items()}
    try:
        torch.set_num_threads(2)
        merge(folders, grams, method='regmean', weights=[1, .37]).save_pretrained(tmp_path/'memory')
        merge_files(folders, grams, method='regmean', weights=[1, .37], out=tmp_path/'files', threads=2)
    finally: torch.set_num_threads(threads)
    assert (tmp_path/'memory'/'model.safetensors').read_bytes() == (tmp_path/'files'/'model.safetensors').read_bytes()

# --- pieces -----------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize('n', [0, 1, 1023, 300_001])
def test_digests_are_those_of_the_bytes(dtype, n):
    bits = torch.randint(-2**62, 2**62, (n,), generator=torch.Generator().manual_seed(n))
    t = bits.view(torch.int8)[:n*dtype.itemsize].view(dtype) if dtype != torch.bool else bits > 0
    want = xxhash.xxh3_64(t.clone().view(torch.uint8).numpy().tobytes()).hexdigest()
    parts = TensorHash(t.shape, dtype)
    for part in t.split(77): parts.add(part)
    assert str(TensorHash(t.shape, dtype).add(t)) == str(parts) == f'({n},) {dtype} {want}'

@pytest.mark.parametrize('t', [torch.randn(40, 60).T, torch.randn(999)[3:], torch.randn(33, dtype=torch.complex64).conj(), torch.randn(70, 90)[:, ::2]],
                         ids=['transposed', 'odd place', 'conjugate', 'every other'])
def test_digests_are_those_of_the_values_wherever_they_lie(t):
    assert hash_tensors({'t': t}) == hash_tensors({'t': t.resolve_conj().clone(memory_format=torch.contiguous_format)})

@pytest.mark.parametrize('models', [3, 5, 17])
@pytest.mark.parametrize('shape', [(1301, 7), (1997,), (65, 64), (400, 36)], ids=str)
def test_blocks_end_where_vectors_do(models, shape, monkeypatch):
    "Of many numbers, torch adds those that its vectors leave over in another order; blocks must leave over the same."
    vectors, λ = [torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(models)], torch.ones(models)
    cuts = blocks.cut('a', shape, models)
    parts = [elect_and_mean([v[b.rows] for v in vectors], λ) for b in cuts]
    assert_close(torch.cat(parts), elect_and_mean(vectors, λ), rtol=0, atol=0)
    assert [b.rows.start for b in cuts[1:]] == [b.rows.stop for b in cuts[:-1]] and cuts[-1].rows.stop == shape[0]
    assert len(cuts) > 1 or shape == (65, 64)

@pytest.mark.parametrize('few', [50, *SLOW([1, 1 << 20])])
@pytest.mark.parametrize('k', [0, 1, 499, 500, 998, 999])
@pytest.mark.parametrize('numbers', ['normal', 'equal', 'zeros', 'tiny', 'halves'])
def test_kth_smallest(few, k, numbers):
    v = torch.randn(1000, generator=torch.Generator().manual_seed(3), dtype=torch.float64).abs()
    v = dict(normal=v, equal=torch.full_like(v, .1), zeros=v*(v > 1), tiny=v*5e-324*100, halves=v.half().double())[numbers]
    assert blocks.kth_smallest(lambda: v.split(77), k, few) == v.sort().values[k]


# --- refusals ---------------------------------------------------------------------------------

def truncate(folders, folder): os.truncate(folders['t1']/'model.safetensors', 5000)
def no_weights(folders, folder): (folders['t1']/'model.safetensors').unlink()
def wider(folders, folder): tiny(**SIZE | dict(vocab=132), dtype=torch.float32).save_pretrained(folders['t1'])
def not_finite(folders, folder):
    model = load(folders['t1']); model.bert.encoder.layer[1].output.dense.weight.data[2, 3] = torch.nan; model.save_pretrained(folders['t1'])
def a_weight_less(folders, folder):
    old = load_file(folders['t1']/'model.safetensors')
    del old['bert.encoder.layer.1.output.dense.weight']
    save_file(old, folders['t1']/'model.safetensors', dict(format='pt'))
def a_merge(folders, folder): merge(folders, method='average').save_pretrained(folder/'m'); folders['t1'] = folder/'m'

BROKEN = {o.__name__: o for o in (truncate, no_weights, wider, not_finite, a_weight_less, a_merge)}
AVERAGE = dict(method='average')
BAD = {'unknown-method': dict(method='mean'), 'unknown-option': AVERAGE | dict(density=1), 'no-fishers': {}, 'unknown-variant': dict(variant='x'),
       'needless-base': AVERAGE | dict(base='x'), 'no-base': dict(method='ties'), 'weights': AVERAGE | dict(weights=dict(t0=1)),
       'negative': AVERAGE | dict(weights=dict(t0=1, t1=-1, t2=1)), 'fishers': dict(fishers=dict(t0='x')), 'no-file': dict(fishers=dict(t0='x', t1='x', t2='x')),
       'base-elsewhere': dict(method='dare', base='/nowhere/at/all'), 'density': dict(method='ties', base='BASE', density=0)}

def refusal(f):
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as e: f()
    return type(e.value), str(e.value)

def refused_alike(folders, folder, **kw):
    a = refusal(lambda: merge(folders, progress=False, **kw))
    assert a == refusal(lambda: merge_files(folders, out=folder/'out', progress=False, **kw))
    assert not (folder/'out').exists()
    return a[1]

@pytest.mark.parametrize('how', BROKEN)
def test_broken_models_are_refused_alike(tmp_path, how):
    folders = make(tmp_path)
    BROKEN[how](folders, tmp_path)
    refused_alike(folders, tmp_path, method='average')

@pytest.mark.parametrize('how', BAD)
def test_bad_arguments_are_refused_alike(tmp_path, how):
    folders = make(tmp_path)
    refused_alike(folders, tmp_path, **{k: tmp_path/'in'/'base' if v == 'BASE' else v for k, v in BAD[how].items()})

def spoil(file, kind, change):
    o = kind.load(file)
    change(o)
    o.save(file)

def number(v):
    def change(o): o.values['encoder.layer.1.output.dense.weight'][2, 3] = v
    return change

def lacking(o): del o.values['encoder.layer.1.output.dense.weight']
def estimator(o): o.meta['estimator'] = 'exact'
def other_weights(o): o.meta['weight_hash'] = 'f'*16
def shape(o): o.values['encoder.layer.1.output.dense.weight'] = torch.ones(3, 3)

SPOILS = {'nan': number(torch.nan), 'negative': number(-1.), 'infinite': number(torch.inf), 'lacking': lacking, 'estimator': estimator, 'weights': other_weights, 'shape': shape}

@pytest.mark.parametrize('how', SPOILS)
@pytest.mark.parametrize('method', ['fisher', 'regmean'])
def test_spoilt_evidence_is_refused_alike(tmp_path, method, how):
    folders = make(tmp_path)
    kw = arguments(method, {}, folders, tmp_path)
    spoil(kw['fishers']['t1'], dict(fisher=ParameterFisher, regmean=Grams)[method], SPOILS[how])
    a, b = (refusal(lambda: f(folders, progress=False, **kw)) for f in (merge, lambda *x, **k: merge_files(*x, out=tmp_path/'out', **k)))
    assert a[0] == b[0] and a[1].split(': ')[0] in b[1] and not (tmp_path/'out').exists()

def test_evidence_of_another_kind(tmp_path):
    folders = make(tmp_path)
    refused_alike(folders, tmp_path, fishers=measure('fisher', folders, tmp_path), method='regmean')
    refused_alike(folders, tmp_path, fishers=measure('mask-fisher', folders, tmp_path), variant='released')

@pytest.mark.parametrize('which', ['weight_hash', 'head_hash'])
def test_other_weights_than_meant(tmp_path, which):
    folders = make(tmp_path)
    sources = folders | dict(t1=Source(str(folders['t1']), **{which: 'f'*16}))
    assert 'is not what it was' in refused_alike(sources, tmp_path, method='average')
    base = Source(str(tmp_path/'in'/'base'), weight_hash='f'*16)
    assert 'the base' in refused_alike(folders, tmp_path, method='ties', base=base)

def test_models_in_memory_are_for_merge(tmp_path):
    with pytest.raises(TypeError, match='is in memory'): merge_files([tiny()], method='average', out=tmp_path/'out')

def test_the_output_never_touches_a_source(tmp_path):
    folders = make(tmp_path)
    before = contents(tmp_path/'in')
    for out in (folders['t1'], folders['t1']/'inside', tmp_path/'in'):
        with pytest.raises(OutputExistsError): merge_files(folders, method='average', out=out, overwrite=True)
    assert contents(tmp_path/'in') == before


# --- all or nothing ---------------------------------------------------------------------------

@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize('earlier', [False, True])
def test_what_is_interrupted_leaves_nothing(tmp_path, monkeypatch, error, earlier):
    folders, out = make(tmp_path), tmp_path/'out'
    if earlier: merge_files(folders, method='average', weights=[1, 2, 3], out=out)
    before, write, count = contents(tmp_path), disk.TensorSlot.__setitem__, [0]
    def fail(self, rows, values):
        count[0] += 1
        if count[0] > 20: raise error
        write(self, rows, values)
    monkeypatch.setattr(disk.TensorSlot, '__setitem__', fail)
    with pytest.raises(type(error)): merge_files(folders, method='average', out=out, overwrite=True, progress=False)
    assert contents(tmp_path) == before and out.exists() == earlier

def test_sources_stay_as_they_are(tmp_path):
    folders = make(tmp_path)
    before = contents(tmp_path/'in')
    merge_files(folders, method='average', out=tmp_path/'out')
    assert contents(tmp_path/'in') == before


def test_the_base_is_not_overwritten(tmp_path):
    folders, base = make(tmp_path), tmp_path/'in'/'base'
    before = contents(base)
    for run in (lambda: merge_files(folders, method='ties', base=base, out=base, overwrite=True),
                lambda: merge(folders, method='ties', base=base).save_pretrained(base, overwrite=True)):
        with pytest.raises(OutputExistsError, match="model of 'base'"): run()
    assert contents(base) == before

def test_shards_replace_the_weights_of_a_plain_model(tmp_path):
    folders, out = make(tmp_path), tmp_path/'out'
    load(folders['t2']).save_pretrained(out)
    merge_files(folders, method='average', out=out, overwrite=True, max_shard_size='20KB')
    want = Merged.from_pretrained(out).body.state_dict()
    for n, t in BertModel.from_pretrained(out).state_dict().items(): assert_close(t, want[n], rtol=0, atol=0)

@pytest.mark.parametrize('size', ['abc', 0, -1, True, 1.5, None, '-5GB', '5GiB'])
def test_a_shard_size_is_a_size(tmp_path, size):
    with pytest.raises(ValueError, match='`max_shard_size` is'): merge_files({'a': 'nowhere'}, method='average', out=tmp_path/'o', max_shard_size=size)

def test_two_names_for_one_weight(tmp_path):
    folders = make(tmp_path)
    old = load_file(folders['t1']/'model.safetensors')
    old |= {n.replace('LayerNorm.weight', 'LayerNorm.gamma'): torch.zeros_like(t) for n, t in old.items() if 'LayerNorm.weight' in n}
    save_file(old, folders['t1']/'model.safetensors', dict(format='pt'))
    with pytest.raises(ValueError, match='has both'): merge_files(folders, method='average', out=tmp_path/'o')

# --- memory -----------------------------------------------------------------------------------

PEAK = '''import re, sys, threading, time
from fisher_nodes.core import blocks
from fisher_nodes.merging.run import merge_files
from pathlib import Path
blocks.BLOCK = 1 << 20
def now(): return int(re.search(r'RssAnon:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])
peak, models = [0], {f't{i}': sys.argv[1] for i in range(int(sys.argv[2]))}
merge_files(models, method='average', out=sys.argv[3], progress=False)
start = now()
def watch():
    while peak: peak[0] = max(peak[0], now()); time.sleep(.002)
threading.Thread(target=watch, daemon=True).start()
merge_files(models, method='average', out=sys.argv[3]+'2', progress=False)
print(max(0, peak[0]-start)//1024)'''

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='memory is read from /proc, which only Linux has')
def test_memory_does_not_grow_with_the_number_of_models(tmp_path):
    "The file has 40 MB and a block 4; ten files must not take even one more than two do."
    tiny(hidden=256, intermediate=1024, vocab=30_000, dtype=torch.float32).save_pretrained(tmp_path/'in')
    size = (tmp_path/'in'/'model.safetensors').stat().st_size >> 20
    peaks = [int(subprocess.run([sys.executable, '-c', PEAK, str(tmp_path/'in'), str(n), str(tmp_path/f'out{n}')],
                                check=True, capture_output=True, text=True).stdout) for n in (2, 10)]
    assert max(peaks) < size, (peaks, size)

def test_work_on_a_block_does_not_grow_with_the_model(tmp_path, monkeypatch):
    "A body's state is gathered a few times a merge, however many blocks there are: each time takes milliseconds."
    folders, calls, plain = make(tmp_path, 2), [], BertModel.state_dict
    monkeypatch.setattr(BertModel, 'state_dict', lambda self, *a, **kw: (calls.append(1), plain(self, *a, **kw))[1])
    counts = []
    for size in (1 << 22, 1500):
        monkeypatch.setattr(blocks, 'BLOCK', size)
        calls.clear()
        merge_files(folders, method='average', out=tmp_path/str(size))
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0, counts

@pytest.mark.parametrize('whole', [None, ()])
def test_a_rule_sees_whole_parameters_unless_it_says_otherwise(tmp_path, monkeypatch, whole):
    "A rule that needs a parameter's norm gives the same from files as in memory, however large the parameter."
    folders, seen = make(tmp_path, 2), []
    def unit_vectors(job):
        def combine(name, tensors):
            seen.append(name)
            return sum(t/t.norm().clamp_min(1e-12) for t in tensors)
        return Rule(combine, dict.fromkeys(job.names, 'norm'), **{} if whole is None else dict(whole=whole))
    monkeypatch.setitem(methods.METHODS, 'unit-vectors', methods.MergeMethod('unit-vectors', unit_vectors))
    want = merge(folders, method='unit-vectors').body.state_dict()
    count = len(seen)
    got = Merged.from_pretrained(merge_files(folders, method='unit-vectors', out=tmp_path/'out')).body.state_dict()
    same = all(torch.equal(got[n], t) for n, t in want.items())
    assert same == (whole is None), 'rows were cut that should be whole' if whole is None else 'nothing was cut'
    assert (len(seen) == 2*count) == (whole is None)
