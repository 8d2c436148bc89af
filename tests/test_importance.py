"""Importance files: the format as the page specifies it, golden files of every version, files beside a model, and on the Hub."""
import hashlib
import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel
from xxhash import xxh3_64_hexdigest

import zoo
from fisher_nodes import Grams, MaskFisher, Merged, ModelReference, ParameterFisher, mask_fisher, merge, merge_files
from fisher_nodes.app.cli import main
from fisher_nodes.engine.importance import ExpandedFisher, expand_importance, find_beside, importance_schema
from reference import ragged_batches, tiny
from test_cli import save_model, save_rows

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT/'tests'/'fixtures'/'importance'
FILES = sorted(o.name for o in GOLDEN.glob('*.safetensors'))
KINDS = dict(MaskFisher=MaskFisher, ParameterFisher=ParameterFisher, Grams=Grams, ExpandedFisher=ExpandedFisher)
QUIET = dict(progress=False)

spec = importlib.util.spec_from_file_location('make_importance', GOLDEN/'make.py')
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

def header(path):
    "The table of a safetensors file, read by hand."
    data = Path(path).read_bytes()
    return json.loads(data[8:8+struct.unpack('<Q', data[:8])[0]])


# --- the format -------------------------------------------------------------------------------

@pytest.mark.parametrize('name', FILES)
def test_golden_files_are_read(name):
    "Each says what it said when it was written, and one bit less makes it damaged."
    about = header(GOLDEN/name)['__metadata__']
    found = KINDS[about.get('kind', 'MaskFisher')].load(GOLDEN/name)
    assert found.num_examples==7 and {k: found.meta[k] for k in ('model', 'weight_hash', 'data', 'seed')}=={k: make.META[k] for k in ('model', 'weight_hash', 'data', 'seed')}
    for k, v in found.tensors().items(): assert_close(v, load_file(GOLDEN/name)[k], rtol=0, atol=0)
    if isinstance(found, MaskFisher):
        for k, v in make.PARTS.items():
            got = found.tensors()[k]
            assert_close(got.float(), v[:len(got)], rtol=0, atol=0)
        assert len(found.heads[0])==4

@pytest.mark.parametrize('name', [o for o in FILES if o.startswith('v1')])
def test_a_changed_golden_file_is_refused(name, tmp_path):
    about = header(GOLDEN/name)['__metadata__']
    for i, change in enumerate((lambda d: d[:-1]+bytes([d[-1] ^ 1]), lambda d: d.replace(b'someone', b'anybody'), lambda d: d.replace(b'"num_examples":"7"', b'"num_examples":"8"'))):
        new = change((GOLDEN/name).read_bytes())
        assert new!=(GOLDEN/name).read_bytes()
        (tmp_path/f'{i}.safetensors').write_bytes(new)
        with pytest.raises(ValueError, match='is damaged, or was changed'): KINDS[about['kind']].load(tmp_path/f'{i}.safetensors')

def test_every_kind_and_version_has_a_golden_file():
    from fisher_nodes.engine.measure import FORMAT
    assert {o.partition('-')[0] for o in FILES}=={f'v{i}' for i in range(FORMAT+1)}
    assert {header(GOLDEN/o)['__metadata__'].get('kind') for o in FILES}=={None, *KINDS}

@pytest.mark.parametrize('name', [o for o in FILES if o.startswith('v1')])
def test_what_is_written_today_is_what_was_written_then(name, tmp_path):
    "Same tensors, same metadata, same hash."
    make.main(tmp_path)
    old, new = header(GOLDEN/name), header(tmp_path/name)
    assert old==new
    for k, v in load_file(GOLDEN/name).items(): assert_close(load_file(tmp_path/name)[k], v, rtol=0, atol=0)

def fingerprint(tensors):
    "As the page says it, without the package's own."
    lines = [f'{n} {tuple(t.shape)} {t.dtype} {xxh3_64_hexdigest(t.contiguous().numpy().tobytes())}\n' for n, t in sorted(tensors.items())]
    return hashlib.sha256(''.join(lines).encode()).hexdigest()[:16]

@pytest.mark.parametrize('name', [o for o in FILES if o.startswith('v1')])
def test_hashes_are_as_the_page_says(name):
    about = header(GOLDEN/name)['__metadata__']
    said = json.dumps({k: about[k] for k in ('format', 'kind', 'num_examples', 'meta', 'version')})
    assert about['hash']==hashlib.sha256(f'{fingerprint(load_file(GOLDEN/name))} {said}'.encode()).hexdigest()[:16]

def test_the_hash_of_weights_is_as_the_page_says():
    model = tiny()
    found = mask_fisher(model, ragged_batches(), **QUIET)
    assert found.meta['weight_hash']==fingerprint({n: p.detach() for n, p in model.bert.named_parameters()})

def validator():
    jsonschema = pytest.importorskip('jsonschema', reason='jsonschema comes with nbformat, which nbdev installs')
    return jsonschema.Draft202012Validator(importance_schema())

@pytest.mark.parametrize('name', [o for o in FILES if o.startswith('v1')])
def test_the_schema_fits_golden_files(name):
    about = header(GOLDEN/name)['__metadata__']
    validator().validate(about | dict(meta=json.loads(about['meta'])))

RUNS = dict(plain={}, exact=dict(labels='exact'), sampled=dict(labels='sampled', seed=5), half=dict(precision='bf16'), released=dict(variant='released'), matrices=dict(matrices='all'))

@pytest.mark.parametrize('how', RUNS.values(), ids=RUNS)
def test_the_schema_fits_what_is_measured(how, tmp_path):
    mask_fisher(tiny(dtype=torch.float32), ragged_batches(), **how, **QUIET).save(tmp_path/'f')
    about = header(tmp_path/'f')['__metadata__']
    validator().validate(about | dict(meta=json.loads(about['meta'])))

def test_the_schema_fits_many_choices(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=4, n_positions=20, bos_token_id=0, eos_token_id=0))
    ids = torch.randint(1, 30, (3, 6))
    mask_fisher(model, [dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)], reduction='per-token', **QUIET).save(tmp_path/'f')
    about = header(tmp_path/'f')['__metadata__']
    meta = json.loads(about['meta'])
    validator().validate(about | dict(meta=meta))
    assert meta['reduction']=='per-token' and meta['num_choices']>meta['num_examples']

WRONG = dict(kind=dict(kind='Soup'), version=dict(version='2'), hash=dict(hash='x'), extra=dict(more='1'), examples=dict(num_examples='many'))

@pytest.mark.parametrize('change', WRONG.values(), ids=WRONG)
def test_the_schema_refuses(change):
    about = header(GOLDEN/'v1-mask-fisher.safetensors')['__metadata__']
    assert list(validator().iter_errors(about | dict(meta=json.loads(about['meta'])) | change))

def test_a_later_version_is_refused_by_its_number(tmp_path):
    about = header(GOLDEN/'v1-mask-fisher.safetensors')['__metadata__']
    for version in ('2', '01', 'one', '1'*5000):
        save_file(make.PARTS, tmp_path/'f', about | dict(version=version))
        with pytest.raises(ValueError, match='is a MaskFisher of format version .*; this fisher_nodes reads versions up to 1') as e: MaskFisher.load(tmp_path/'f')
        assert len(str(e.value))<1000

def test_the_schema_is_in_the_package():
    assert importance_schema()==json.loads((ROOT/'fisher_nodes'/'importance.schema.json').read_text())
    assert "'*.json'" in (ROOT/'setup.py').read_text() and '*.json' in (ROOT/'MANIFEST.in').read_text()

def reader():
    "The reader of the page."
    cells = [''.join(o['source']) for o in json.loads((ROOT/'nbs'/'engine'/'10_importance.ipynb').read_text(encoding='utf-8'))['cells']]
    i = next(i for i, o in enumerate(cells) if o.startswith('def read_importance'))
    return f'{cells[i-1]}\n\n{cells[i]}'

@pytest.mark.parametrize('name', [o for o in FILES if 'mask' in o or 'uneven' in o])
def test_the_reader_of_the_page_needs_safetensors_only(name):
    "Typed into an interpreter in which nothing else can be imported, it gives the golden numbers."
    code = f'''import sys, importlib.abc
class Others(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.partition('.')[0]
        if top not in sys.stdlib_module_names and top!='safetensors': raise ImportError('not allowed: '+name)
sys.meta_path.insert(0, Others())
{reader()}
found, about = read_importance({str(GOLDEN/name)!r})
print(json.dumps([found, about]))'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={k: v for k, v in os.environ.items() if k!='PYTHONPATH'})
    assert not done.returncode, done.stderr
    found, about = json.loads(done.stdout)
    for k, v in make.PARTS.items():
        part, layer = k.split('.')
        got = found[part][layer]
        assert got==v[:len(got)].tolist() and got
    assert about==make.META | dict(kind='MaskFisher') and len(reader().splitlines())<=15


# --- beside a model ---------------------------------------------------------------------------

@pytest.fixture
def pair(tmp_path):
    "Two folders, each with a model and what was measured of it."
    for i, t in enumerate('ab'):
        save_model(tmp_path/t, 2+i, seed=i)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path/t)
        mask_fisher(model, ragged_batches(num_labels=2, vocab=12, seed=i), **QUIET).save(tmp_path/t/'mask-fisher.safetensors')
    return {t: tmp_path/t for t in 'ab'}

def test_a_merge_takes_what_lies_beside(pair, tmp_path):
    "In memory, loaded from a folder, from file to file, and from a shell: the bits of a merge that names the files."
    files = {t: o/'mask-fisher.safetensors' for t, o in pair.items()}
    want = merge(pair, files, **QUIET)
    loaded = {t: AutoModelForSequenceClassification.from_pretrained(o) for t, o in pair.items()}
    found = {'by name': merge(pair, 'beside', **QUIET), 'in memory': merge(loaded, fishers='beside', **QUIET),
             'references': merge({t: ModelReference(str(o)) for t, o in pair.items()}, fishers='beside', weights=[1, 1], **QUIET)}
    merge_files(pair, 'beside', out=tmp_path/'files', **QUIET)
    assert not main(f'merge a={pair["a"]} b={pair["b"]} --fisher beside --out {tmp_path}/shell'.split())
    found |= {o: Merged.from_pretrained(tmp_path/o) for o in ('files', 'shell')}
    plain = merge(pair, method='average', **QUIET).body.state_dict()
    assert any(not torch.equal(v, plain[k]) for k, v in want.body.state_dict().items())
    for what, o in found.items():
        for k, v in want.body.state_dict().items(): assert_close(o.body.state_dict()[k], v, rtol=0, atol=0, msg=f'{what}: {k}')
    assert found['shell'].recipe['fishers']['a']==dict(file=str(files['a']), hash=header(files['a'])['__metadata__']['hash'])

def test_what_lies_beside_other_weights_is_refused(pair, tmp_path):
    other = tmp_path/'a'/'mask-fisher.safetensors'
    other.write_bytes((tmp_path/'b'/'mask-fisher.safetensors').read_bytes())
    for f in (lambda: merge(pair, fishers='beside', **QUIET), lambda: merge_files(pair, 'beside', out=tmp_path/'new', **QUIET)):
        with pytest.raises(ValueError, match="Fisher of 'a' was measured on other weights"): f()
    assert not (tmp_path/'new').exists()
    about = header(GOLDEN/'v0-mask-fisher.safetensors')['__metadata__']
    save_file(make.PARTS, other, about | dict(meta='{}'))
    with pytest.raises(ValueError, match="does not say on which weights it was measured, so it cannot be taken for those of 'a'"): merge(pair, fishers='beside', **QUIET)
    other.unlink()
    with pytest.raises(ValueError, match=f"there is no mask-fisher.safetensors beside the model of 'a', {tmp_path}/a"): merge(pair, fishers='beside', **QUIET)
    outside = tmp_path/'elsewhere.safetensors'
    outside.write_bytes((tmp_path/'b'/'mask-fisher.safetensors').read_bytes())
    other.symlink_to(outside)
    with pytest.raises(ValueError, match='leads out of|outside|link'): merge(pair, fishers='beside', **QUIET)

def test_in_memory_without_a_folder():
    with pytest.raises(ValueError, match="no mask-fisher.safetensors beside the model of 'a', BertForSequenceClassification"): find_beside('a', tiny())

def test_a_model_with_a_file_beside_loads_as_before(pair):
    "transformers, and a merge that does not ask for it, take no notice."
    merge(pair, method='average', **QUIET)
    merge_files(pair, method='average', out=pair['a'].parent/'out', **QUIET)
    assert not (pair['a'].parent/'out'/'mask-fisher.safetensors').exists()

SCRIPT = """
import json, sys
from pathlib import Path
from fisher_nodes import MaskFisher, merge
from fisher_nodes.app.cli import main
from fisher_nodes.engine.importance import push_importance
here, said = Path(sys.argv[1]), {}
def refused(what, f):
    try: said[what] = f()
    except (ValueError, TypeError) as e: said[what] = str(e)
exec(sys.argv[2], globals())
print(json.dumps(said))
"""

def elsewhere(hub, tmp_path, code, **env):
    "Run `code` in a process that believes the stand-in to be the Hub."
    env = os.environ | dict(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE='0', HF_HUB_DISABLE_XET='1', HF_HOME=str(tmp_path/'hf'), HF_HUB_DISABLE_PROGRESS_BARS='1',
                            HF_HUB_DISABLE_TELEMETRY='1', NO_PROXY='127.0.0.1', no_proxy='127.0.0.1') | env
    done = subprocess.run([sys.executable, '-c', SCRIPT, str(tmp_path), code], capture_output=True, text=True, timeout=400, env={k: v for k, v in env.items() if v is not None})
    assert done.returncode==0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

def put(hub, name, folder):
    files = {o.name: o.read_bytes() for o in Path(folder).iterdir() if o.name!='mask-fisher.safetensors'}
    hub.repos[name] = dict(files=files, sha=hashlib.sha1(name.encode()).hexdigest(), commits=[], branches=['main'])

def test_to_the_hub_and_from_there(hub, pair, tmp_path):
    "A shell measures and pushes; a merge of two ids takes what lies beside; one file in one commit."
    save_rows(tmp_path/'rows.csv', [0, 1]*6)
    for t in 'ab': put(hub, f'me/{t}', pair[t])
    said = elsewhere(hub, tmp_path, """
refused('missing', lambda: merge(dict(a='me/a', b='me/b'), fishers='beside'))
said['shell'] = main(f'fisher {here}/a --data {here}/rows.csv --num-samples 8 --out {here}/f.safetensors --push-to me/a'.split())
said['url'] = push_importance(MaskFisher.load(here/'b'/'mask-fisher.safetensors'), 'b', commit_message='Measured')
import shutil; shutil.rmtree(here/'hf', ignore_errors=True)
merge(dict(a='me/a', b='me/b'), fishers='beside', progress=False).save_pretrained(here/'from_hub')
""", HF_TOKEN='good')
    assert "there is no mask-fisher.safetensors beside the model of 'a', me/a" in said['missing'] and said['shell']==0
    assert said['url'].startswith(f'{hub.url}/me/b/commit/')
    assert [c[1:] for t in 'ab' for c in hub.repos[f'me/{t}']['commits']]==[('MaskFisher of 8 examples', ['mask-fisher.safetensors']), ('Measured', ['mask-fisher.safetensors'])]
    (tmp_path/'pushed').write_bytes(hub.repos['me/a']['files']['mask-fisher.safetensors'])
    assert header(tmp_path/'pushed')==header(tmp_path/'f.safetensors') # the hash in it is of all numbers
    MaskFisher.load(tmp_path/'pushed')
    got = Merged.from_pretrained(tmp_path/'from_hub').body.state_dict()
    want = merge(pair, dict(a=tmp_path/'f.safetensors', b=pair['b']/'mask-fisher.safetensors'), **QUIET).body.state_dict()
    for k, v in want.items(): assert_close(got[k], v, rtol=0, atol=0)

def test_what_cannot_be_pushed(hub, pair, tmp_path):
    "One line each, before anything is measured; no repository is made, nothing is uploaded."
    save_rows(tmp_path/'rows.csv', [0, 1]*6)
    put(hub, 'me/a', pair['a'])
    said = elsewhere(hub, tmp_path, """
fisher = MaskFisher.load(here/'a'/'mask-fisher.safetensors')
refused('name', lambda: push_importance(fisher, 'no/such/name'))
refused('no token', lambda: push_importance(fisher, 'me/a'))
refused('bad token', lambda: push_importance(fisher, 'me/a', token='bad'))
refused('nothing there', lambda: push_importance(fisher, 'me/typo', token='good'))
refused('a file', lambda: push_importance(str(here), 'me/a', token='good'))
import os; os.environ['HF_TOKEN'] = 'good'
said['shell'] = main(f'fisher {here}/a --data {here}/rows.csv --num-samples 8 --out {here}/f.safetensors --push-to me/typo'.split())
""", HF_TOKEN=None)
    for k, word in {'name': 'no/such/name', 'no token': 'hf auth login', 'bad token': 'does not know this token', 'nothing there': 'cannot push to me/typo', 'a file': 'got str'}.items():
        assert word in said[k] and '\n' not in said[k], (k, said[k])
    assert said['shell']==2 and not (tmp_path/'f.safetensors').exists() and not hub.lfs and set(hub.repos)=={'me/a'}


# --- by the names of tensors ------------------------------------------------------------------

ZOO = ['bert', 'gpt2', 'llama', 'vit', 'mixtral', 't5', 'modernbert', 'deberta-v2', 'gpt_neox']

def by_name(states, views, weights):
    "The line of the page, in float64: no heads, no neurons, no axes."
    out = {}
    for name, first in states[0].items():
        F = [v[name].double() for v in views]
        below = sum(w*f for w, f in zip(weights, F))
        plain = sum(w*s[name].double() for w, s in zip(weights, states))/sum(weights)
        mean = sum(w*f*s[name].double() for w, f, s in zip(weights, F, states))/below.where(below>0, 1)
        out[name] = mean.where(below>0, plain).expand(first.shape)
    return out

@pytest.mark.parametrize('scheme', [None, 'with-value', 'layer-mean'])
@pytest.mark.parametrize('name', ZOO)
def test_the_line_of_the_page_is_our_merge(name, scheme):
    models = {t: zoo.build(name, seed=i) for i, t in enumerate('ab')}
    gen = torch.Generator().manual_seed(3)
    from fisher_nodes.core.places import count_nodes
    from fisher_nodes.core.fisher import part_name
    def made(m):
        kinds = {part_name(k): tuple(torch.rand(n, generator=gen, dtype=torch.float64) for n in layers) for k, layers in count_nodes(m).items()}
        for o in kinds.values(): o[0][0] = 0 # no Fisher in any model
        return MaskFisher(**kinds)
    fishers = {t: made(m) for t, m in models.items()}
    try: want = merge(models, fishers, weights=[1, .5], scheme=scheme, **QUIET)
    except ValueError as e:
        with pytest.raises(ValueError) as same: [expand_importance(fishers[t], m, scheme) for t, m in models.items()]
        assert 'of the scheme is weighted by' in str(e) and str(same.value)==str(e)
        return
    views = [expand_importance(fishers[t], m, scheme) for t, m in models.items()]
    prefix = views[0].meta['prefix']
    states = [{prefix+n: p.detach() for n, p in m.base_model.named_parameters()} if prefix else {n: p.detach() for n, p in zip_names(m)} for m in models.values()]
    got = by_name(states, [o.values for o in views], [1, .5])
    for n, p in want.body.named_parameters(): assert_close(p.detach(), got[prefix+n].to(p.dtype), rtol=2e-6 if p.dtype==torch.float32 else 1e-12, atol=1e-9, msg=f'{n}')

def zip_names(model):
    from fisher_nodes.core.families import body_of
    return body_of(model).named_parameters()

def test_the_shell_writes_the_names_of_files(pair, tmp_path, capsys):
    save_rows(tmp_path/'rows.csv', [0, 1]*6)
    line = f'fisher {pair["a"]} --data {tmp_path}/rows.csv --num-samples 8 --out {tmp_path}/f.safetensors'
    assert not main(f'{line} --expand {tmp_path}/e.safetensors --json'.split())
    assert json.loads(capsys.readouterr().out)['expanded']==f'{tmp_path}/e.safetensors'
    found, stored = ExpandedFisher.load(tmp_path/'e.safetensors'), load_file(pair['a']/'model.safetensors')
    assert set(found.values)==set(stored) and found.meta['scheme']=='paper' and found.meta['prefix']=='bert.'
    for k, v in found.values.items(): assert v.ndim==stored[k].ndim and all(x in (1, y) for x, y in zip(v.shape, stored[k].shape))
    fisher = MaskFisher.load(tmp_path/'f.safetensors')
    assert_close(found.values['bert.encoder.layer.1.intermediate.dense.bias'], fisher.rows[1], rtol=0, atol=0)
    for more, says in ((f'--expand {tmp_path}/f.safetensors', 'one file'), (f'--expand {tmp_path}/g.safetensors --variant released', '--expand is for --variant paper')):
        assert main(f'{line} --overwrite {more}'.split())==2
        assert says in capsys.readouterr().err

@pytest.mark.parametrize('variant', ['released'])
def test_a_variant_that_looks_at_all_models_cannot_be_expanded(variant):
    model = tiny()
    with pytest.raises(ValueError, match="variant 'released' changes Fishers by looking at those of all models"):
        expand_importance(mask_fisher(model, ragged_batches(), variant=variant, **QUIET), model)
    with pytest.raises(ValueError, match="role 'soup' of the scheme is unknown"): expand_importance(mask_fisher(model, ragged_batches(), **QUIET), model, dict(soup='head'))
