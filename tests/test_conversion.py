"""Checkpoints that have only a pickle: converted because the user said so, bit for bit; or loaded from the Hub's own conversion, in a cache of its layout; anything else is refused in one line."""
import hashlib
import json
import os
import random
import shutil
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import transformers
from huggingface_hub import constants
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertTokenizerFast, GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent/'faults'))
import hostile
import fisher_nodes.engine.hub as hub_module
from fisher_nodes import ModelReference, merge, merge_files, run_recipe
from fisher_nodes.app.cli import main
from fisher_nodes.engine.files import OutputExistsError
from fisher_nodes.engine.hub import find_conversion
from fisher_nodes.engine.models import hub_commit, load_model
from fisher_nodes.engine.pickles import convert_pickle
from fisher_nodes.experiment.checkpoints import PAPER_CHECKPOINTS
from fisher_nodes.tasks.finetuning import load_body
from fisher_nodes.tasks.tasks import GLUE
from reference import tiny
from test_bad_input import refuses

pytestmark = pytest.mark.filterwarnings('ignore')
COMMAND = r'`fisher-nodes convert {} --out DIR` makes safetensors of it'
OLD = {'LayerNorm.weight': 'LayerNorm.gamma', 'LayerNorm.bias': 'LayerNorm.beta'}

def old_name(n): return next((n.removesuffix(k)+v for k, v in OLD.items() if n.endswith(k)), n)

def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=40))

MODELS = dict(bert=lambda: tiny(dtype=torch.float32), bfloat16=lambda: tiny(dtype=torch.bfloat16), roberta=lambda: tiny('roberta', num_labels=2, dtype=torch.float32), tied=gpt2)

def pickled(folder, model, old=False, shards=1, zipped=True, words=True):
    "A checkpoint as it was written before safetensors; returns what its pickles hold."
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    state = OrderedDict((old_name(n) if old else n, t) for n, t in model.state_dict().items())
    names, files = list(state), {}
    for i in range(shards):
        file = 'pytorch_model.bin' if shards==1 else f'pytorch_model-{i+1:05}-of-{shards:05}.bin'
        files |= dict.fromkeys(names[i::shards], file)
        torch.save(OrderedDict((n, state[n]) for n in names[i::shards]), folder/file, _use_new_zipfile_serialization=zipped)
    if shards>1: (folder/'pytorch_model.bin.index.json').write_text(json.dumps(dict(metadata={}, weight_map=files)))
    if words: hostile.tokenizer().save_pretrained(folder)
    return state

def holds(folder):
    "All tensors of a folder."
    return {n: t for f in folder.glob('*.safetensors') for n, t in load_file(f).items()}

def bits(t): return t.contiguous().view(torch.uint8) if t.ndim else t

def same(a, b):
    assert set(a)==set(b)
    for n in a: assert a[n].dtype==b[n].dtype and torch.equal(bits(a[n]), bits(b[n])), n


# --- by command -----------------------------------------------------------------------------

@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('shards,zipped', [(1, True), (1, False), (3, True), (3, False)])
def test_bit_for_bit(kind, shards, zipped, tmp_path):
    "Tensors as the pickle has them, under its names; what loads is the model, tied weights included."
    model = MODELS[kind]()
    state = pickled(tmp_path/'old', model, kind=='bert', shards, zipped)
    assert convert_pickle(tmp_path/'old', tmp_path/'new')==tmp_path/'new'
    same(holds(tmp_path/'new'), state)
    found = load_model(tmp_path/'new')
    assert type(found) is type(model)
    same(found.state_dict(), model.state_dict())
    if kind=='tied':
        assert 'lm_head.weight' in state
        if Version(transformers.__version__) >= Version('5.1'): assert found.lm_head.weight is found.transformer.wte.weight # 5.0 leaves apart what a file has twice
    if kind=='bert' and shards==1: assert any('gamma' in n for n in holds(tmp_path/'new'))

def test_what_is_written_down(tmp_path):
    "The SHA-256 of each pickle, the model, the files; what is carried along, and what is not."
    pickled(tmp_path/'old', tiny(dtype=torch.float32), shards=2)
    for name in ('README.md', 'generation_config.json', 'training_args.bin', 'run.py', 'optimizer.pt', 'notes.json'): (tmp_path/'old'/name).write_text('{}')
    convert_pickle(tmp_path/'old', tmp_path/'new')
    record = json.loads((tmp_path/'new'/'convert.json').read_text())
    files = {o.name: o for o in (tmp_path/'old').glob('pytorch_model-*')}
    assert record['pickles']=={n: dict(sha256=hashlib.sha256(o.read_bytes()).hexdigest(), size=o.stat().st_size) for n, o in files.items()} and len(files)==2
    assert record['model']=='old' and record['revision'] is None and record['tensors']==len(tiny().state_dict()) and set(record['versions'])=={'fisher_nodes', 'torch', 'transformers'}
    written = {o.name for o in (tmp_path/'new').iterdir()}
    assert {'README.md', 'generation_config.json', 'config.json', 'tokenizer.json', 'model.safetensors.index.json', 'model-00001-of-00002.safetensors'}<=written
    assert not written&{'training_args.bin', 'run.py', 'optimizer.pt', 'notes.json', *files} and set(record['files'])==written-{'convert.json'}
    assert (tmp_path/'new'/'tokenizer.json').read_bytes()==(tmp_path/'old'/'tokenizer.json').read_bytes()

def test_a_folder_is_whole_or_as_it_was(tmp_path):
    "Refused without overwrite, replaced with it; other people's files stay."
    pickled(tmp_path/'old', tiny(dtype=torch.float32), shards=2)
    convert_pickle(tmp_path/'old', tmp_path/'new')
    with pytest.raises(OutputExistsError, match='is not empty'): convert_pickle(tmp_path/'old', tmp_path/'new')
    (tmp_path/'new'/'mine.txt').write_text('mine')
    pickled(tmp_path/'one', tiny(seed=1, dtype=torch.float32))
    convert_pickle(tmp_path/'one', tmp_path/'new', overwrite=True)
    assert (tmp_path/'new'/'mine.txt').exists() and not list((tmp_path/'new').glob('model-*'))
    before = {o: o.read_bytes() for o in (tmp_path/'new').iterdir() if o.is_file()}
    torch.save([1], tmp_path/'one'/'pytorch_model.bin')
    with refuses('holds list'): convert_pickle(tmp_path/'one', tmp_path/'new', overwrite=True)
    assert before=={o: o.read_bytes() for o in (tmp_path/'new').iterdir()}
    for out in ('old', 'old/new', '.'):
        with pytest.raises(OutputExistsError, match="in the model of 'model'"): convert_pickle(tmp_path/'old', tmp_path/out, overwrite=True)

class Runs:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (os.system, (f'touch {self.path}',))

w = torch.ones(2)
CONTENTS = {
    'code': (lambda d: dict(w=Runs(d/'RAN')), 'pytorch_model.bin is not read: it holds more than tensors, or is damaged; it asks for posix.system'), 'a module': (lambda d: torch.nn.Linear(2, 2), 'it asks for torch.nn.modules.linear.Linear'),
    'a checkpoint': (lambda d: dict(state_dict=dict(w=w), epoch=3), 'state_dict is dict, expected a tensor'), 'a number': (lambda d: dict(w=w, step=3), 'step is int, expected a tensor'), 'a list': (lambda d: [w], 'holds list, expected tensors by name'),
    'numbers for names': (lambda d: {0: w}, 'holds dict, expected tensors by name'), 'nothing': (lambda d: {}, 'holds no tensor'), 'sparse': (lambda d: dict(w=w.to_sparse()), 'w is a tensor without plain numbers'),
    'no numbers': (lambda d: dict(w=w.to('meta')), 'w is a tensor without plain numbers'), 'wrapped': (lambda d: {f'module.{n}': t for n, t in tiny().state_dict().items()}, 'so it was saved from inside a wrapper'),
    'two names': (lambda d: {'bert.embeddings.LayerNorm.gamma': w, 'bert.embeddings.LayerNorm.weight': w}, 'which is meant'), 'complex': (lambda d: {'bert.x.weight': w.to(torch.complex64)}, 'bert.x.weight is a tensor without plain numbers')}

@pytest.mark.parametrize('content,says', CONTENTS.values(), ids=CONTENTS)
def test_contents(content, says, tmp_path):
    pickled(tmp_path/'old', tiny())
    for zipped in (True, False):
        torch.save(content(tmp_path), tmp_path/'old'/'pytorch_model.bin', _use_new_zipfile_serialization=zipped)
        with refuses(says): convert_pickle(tmp_path/'old', tmp_path/'new')
    assert not (tmp_path/'RAN').exists() and not (tmp_path/'new').exists()

@pytest.mark.parametrize('content', [*hostile.BYTES_, b'', b'hello', b'PK\x05\x06'+b'\0'*18], ids=range(len(hostile.BYTES_)+3))
def test_damaged_files(content, tmp_path):
    pickled(tmp_path/'old', tiny())
    (tmp_path/'old'/'pytorch_model.bin').write_bytes(content)
    with refuses('pytorch_model.bin is not read: it holds more than tensors, or is damaged; '): convert_pickle(tmp_path/'old', tmp_path/'new')
    assert not (tmp_path/'new').exists()

NAMES = [f'pytorch_model-{i:05}-of-00002.bin' for i in (1, 2)]
INDEXES = {
    'outside': (lambda m: dict(weight_map={n: '../'+f for n, f in m.items()}), 'is not an index of pickles'), 'other files': (lambda m: dict(weight_map={n: 'evil.bin' for n in m}), 'is not an index of pickles'),
    'a list': (lambda m: dict(weight_map=list(m)), 'is not an index of pickles'), 'none': (lambda m: {}, 'is not an index of pickles'), 'no object': (lambda m: [], 'is not an index of weights: expected an object'),
    'nested': (lambda m: dict(weight_map={n: [f] for n, f in m.items()}), 'is not an index of pickles'), 'missing shard': (lambda m: dict(weight_map=m | {'x': 'pytorch_model-00003-of-00003.bin'}), 'pytorch_model-00003-of-00003.bin is not a file'),
    'wrong place': (lambda m: dict(weight_map={n: NAMES[f==NAMES[0]] for n, f in m.items()}), 'in pytorch_model-0000.*, where it is not')}

@pytest.mark.parametrize('change,says', INDEXES.values(), ids=INDEXES)
def test_indexes(change, says, tmp_path):
    pickled(tmp_path/'old', tiny(), shards=2)
    path = tmp_path/'old'/'pytorch_model.bin.index.json'
    path.write_text(json.dumps(change(json.loads(path.read_text())['weight_map'])))
    with pytest.raises((ValueError, FileNotFoundError), match=says): convert_pickle(tmp_path/'old', tmp_path/'new')
    assert not (tmp_path/'new').exists()

def test_a_tensor_in_two_shards(tmp_path):
    state = pickled(tmp_path/'old', tiny(), shards=2)
    torch.save(state, tmp_path/'old'/NAMES[1])
    with refuses('pytorch_model-00002-of-00002.bin has .*, which pytorch_model.bin.index.json does not place there'): convert_pickle(tmp_path/'old', tmp_path/'new')

def test_folders(tmp_path):
    tiny(dtype=torch.float32).save_pretrained(tmp_path/'safe')
    (tmp_path/'empty').mkdir()
    pickled(tmp_path/'old', tiny())
    def run(o): convert_pickle(o, tmp_path/'new')
    with refuses('safe has model.safetensors, which is loaded as it is'): run(tmp_path/'safe')
    with refuses('empty has no pytorch_model.bin to convert'): run(tmp_path/'empty')
    with refuses('is not a folder; give the folder of a model'): run(tmp_path/'old'/'pytorch_model.bin')
    with refuses('cannot load nobody/nothing'): run('nobody/nothing')
    config = (tmp_path/'old'/'config.json').read_text()
    (tmp_path/'old'/'config.json').write_text(json.dumps(json.loads(config) | dict(quantization_config=dict(bits=4))))
    with refuses('old/config.json: the model is quantised'): run(tmp_path/'old')
    (tmp_path/'old'/'config.json').unlink()
    with refuses('old has no config.json'): run(tmp_path/'old')
    (tmp_path/'old'/'config.json').write_text(config)
    for name in ('pytorch_model.bin', 'tokenizer.json'):
        file, away = tmp_path/'old'/name, tmp_path/f'away-{name}'
        file.rename(away)
        file.symlink_to(away)
        with refuses('is a link that leaves its folder'): run(tmp_path/'old')
        file.unlink()
        os.mkfifo(file)
        with refuses(f'{name} is a pipe'): run(tmp_path/'old')
        file.unlink()
        away.rename(file)
    assert not (tmp_path/'new').exists()

def test_from_a_shell(tmp_path, monkeypatch, capsys):
    "The error names the command; it works; and then so does what failed."
    monkeypatch.chdir(tmp_path)
    for i, t in enumerate('ab'): pickled(tmp_path/t, tiny(seed=i, dtype=torch.float32), old=True)
    assert main('merge a=a b=b --method average --out m'.split())==2
    assert '`fisher-nodes convert a --out DIR` makes safetensors of it' in capsys.readouterr().err
    for t in 'ab': assert main(f'convert {t} --out new-{t} --json'.split())==0
    said = json.loads('['+capsys.readouterr().out.replace('}\n{', '},{')+']')[0]
    assert said['wrote']=='new-a' and list(said['pickles'])==['pytorch_model.bin'] and len(said['pickles']['pytorch_model.bin']['sha256'])==64
    assert main('merge a=new-a b=new-b --method average --out m'.split())==0
    assert main('convert a --out new-a'.split())==2
    assert 'is not empty' in capsys.readouterr().err


# --- from the Hub ---------------------------------------------------------------------------

def keep(cache, name, folder, ref='main', commit=None, only=None):
    "Put a folder where the Hub's client keeps what it downloaded: a ref, and links to blobs."
    commit = commit or f'{len(ref)}'*40
    repo = cache/f'models--{name.replace("/", "--")}'
    snapshot = repo/'snapshots'/commit
    for o in (repo/'blobs', snapshot, (repo/'refs'/ref).parent): o.mkdir(parents=True, exist_ok=True)
    (repo/'refs'/ref).write_text(commit)
    for o in folder.iterdir():
        if only and o.name not in only: continue
        blob = repo/'blobs'/hashlib.sha256(o.read_bytes()).hexdigest()
        shutil.copy(o, blob)
        (snapshot/o.name).unlink(missing_ok=True)
        (snapshot/o.name).symlink_to(os.path.relpath(blob, snapshot))
    return commit

@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'

def both_kinds(tmp_path, name='x', **how):
    "A checkpoint with a pickle, and its conversion."
    model = tiny(dtype=torch.float32, **how)
    pickled(tmp_path/name, model, old=True)
    convert_pickle(tmp_path/name, tmp_path/f'{name}-safe')
    (tmp_path/f'{name}-safe'/'convert.json').unlink()
    return model

@pytest.mark.parametrize('ref', ['refs/pr/1', 'refs/pr/12', 'refs/convert/safetensors'])
def test_a_conversion_in_the_cache(ref, tmp_path, hub):
    "It is used, by every way to load, with a warning; reports and recipes have its commit; files and memory give the same bytes."
    models = {t: both_kinds(tmp_path, t, seed=i) for i, t in enumerate('ab')}
    commits = {}
    for t in 'ab':
        keep(hub, f'me/{t}', tmp_path/t)
        commits[t] = keep(hub, f'me/{t}', tmp_path/f'{t}-safe', ref, commit=f'{t}'*40)
    with pytest.warns(UserWarning, match=f'me/a has only a pickle; its weights are those of {ref}, commit {"a"*40}'): found = load_model('me/a')
    same(found.state_dict(), models['a'].state_dict())
    assert (found.config._name_or_path, found.config._commit_hash)==('me/a', commits['a'])
    same(load_body('me/b').state_dict(), models['b'].base_model.state_dict())
    ids = {t: f'me/{t}' for t in 'ab'}
    merged = merge(ids, method='average')
    assert {t: (o['model'], o['revision'], o['hub']) for t, o in merged.report['tasks'].items()}=={t: (f'me/{t}', commits[t], True) for t in 'ab'} and merged.tokenizer is not None
    assert {t: o['revision'] for t, o in merged.recipe['models'].items()}==commits
    merged.save_pretrained(tmp_path/'one')
    merge_files(ids, method='average', out=tmp_path/'two')
    run_recipe(tmp_path/'two'/'recipe.yml', tmp_path/'three')
    assert len({(tmp_path/o/'model.safetensors').read_bytes() for o in ('one', 'two', 'three')})==1
    assert json.loads((tmp_path/'two'/'merge_report.json').read_text())['tasks']['a']['revision']==commits['a']
    merge(ids, method='task-arithmetic', base='me/a')

def test_the_base_of_an_adapter(tmp_path, hub):
    both_kinds(tmp_path)
    keep(hub, 'me/x', tmp_path/'x')
    commit = keep(hub, 'me/x', tmp_path/'x-safe', 'refs/pr/1')
    lora = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tmp_path/'x-safe'), LoraConfig(task_type='SEQ_CLS', target_modules=['query']))
    lora.save_pretrained(tmp_path/'lora')
    path = tmp_path/'lora'/'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(base_model_name_or_path='me/x')))
    said = merge(dict(a=tmp_path/'lora'), method='average', merge_adapters=True).report['tasks']['a']['adapter']
    assert (said['base'], said['revision'])==('me/x', commit)

def test_only_a_pickle_in_the_cache(tmp_path, hub, capsys, monkeypatch):
    "The command that is named converts it, and notes the commit."
    model = both_kinds(tmp_path)
    commit = keep(hub, 'me/x', tmp_path/'x')
    for f in (load_model, load_body, lambda o: merge(dict(a=o), method='average'), lambda o: merge_files(dict(a=o), method='average', out=tmp_path/'m')):
        with refuses('^cannot load me/x: its weights are a pickle, which can run code and is not read; '+COMMAND.format('me/x')): f('me/x')
    monkeypatch.chdir(tmp_path)
    assert main('convert me/x --out new'.split())==0
    assert json.loads((tmp_path/'new'/'convert.json').read_text())['revision']==commit
    same(load_model(tmp_path/'new').state_dict(), model.state_dict())
    assert (tmp_path/'new'/'tokenizer.json').exists()

def test_nothing_changes_where_there_are_safetensors(tmp_path, hub):
    both_kinds(tmp_path)
    commit = keep(hub, 'me/x', tmp_path/'x-safe')
    keep(hub, 'me/x', tmp_path/'x-safe', 'refs/pr/1')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert hub_commit(load_model('me/x').config)==commit
    with refuses('has model.safetensors, which is loaded as it is'): convert_pickle('me/x', tmp_path/'new')

def test_what_a_cache_cannot_say(tmp_path, hub):
    "Two different conversions, half of one, or nothing at all."
    both_kinds(tmp_path)
    keep(hub, 'me/x', tmp_path/'x')
    keep(hub, 'me/x', tmp_path/'x-safe', 'refs/pr/1', 'a'*40, only=['model.safetensors'])
    with refuses('the cache has refs/pr/1 without its config.json; get the rest with `hf download me/x --revision refs/pr/1`'): load_model('me/x')
    keep(hub, 'me/x', tmp_path/'x-safe', 'refs/pr/3', 'c'*40)
    with refuses('cannot load me/x: it has only a pickle, and the cache has safetensors of refs/pr/1 and refs/pr/3; which is meant'): load_model('me/x')
    assert merge(dict(a=ModelReference('me/x', 'refs/pr/3')), method='average').report['tasks']['a']['revision']=='c'*40
    keep(hub, 'me/x', tmp_path/'x-safe', 'refs/convert/safetensors', 'd'*40)
    assert load_model('me/x').config._commit_hash=='d'*40
    with refuses('cannot load me/y'): load_model('me/y')

class Api:
    "What the Hub would say."
    def __init__(self, files=('config.json', 'pytorch_model.bin'), converts=(), pulls=(), fails=None): self.files, self.converts, self.pulls, self.fails, self.asked = files, converts, pulls, fails, []
    def __call__(self): return self
    def answer(self, what, found):
        self.asked.append(what)
        if what==self.fails: raise ConnectionError('no network')
        return found
    def list_repo_files(self, name): return self.answer('files', list(self.files))
    def list_repo_refs(self, name): return self.answer('refs', SimpleNamespace(converts=[SimpleNamespace(ref=o) for o in self.converts]))
    def get_repo_discussions(self, name, **kw):
        assert kw==dict(author='SFconvertbot', discussion_type='pull_request', discussion_status='open')
        return self.answer('pulls', [SimpleNamespace(author=a, title=t, status=s, git_reference=f'refs/pr/{i+1}') for i, (a, t, s, _) in enumerate(self.pulls)])
    def list_repo_commits(self, name, revision='main'):
        found = 'mo' if revision=='main' else 'p'+self.pulls[int(revision.split('/')[-1])-1][3]
        return self.answer('commits', [SimpleNamespace(commit_id=o) for o in found])

BOT, TITLE = 'SFconvertbot', 'Adding `safetensors` variant of this model'
GOOD = (BOT, TITLE, 'open', 'mo')
SAYS = dict(
    safe=(dict(files=['model.safetensors', 'pytorch_model.bin']), None), shards=(dict(files=['model.safetensors.index.json']), None), neither=(dict(files=['config.json', 'adapter_model.safetensors']), None),
    branch=(dict(converts=['refs/convert/parquet', 'refs/convert/safetensors'], pulls=[GOOD]), 'refs/convert/safetensors'), pull=(dict(pulls=[GOOD]), 'refs/pr/1'), sharded=(dict(files=['pytorch_model.bin.index.json'], pulls=[GOOD]), 'refs/pr/1'),
    third=(dict(pulls=[('evil', TITLE, 'open', 'mo'), (BOT, TITLE, 'open', 'xo'), GOOD]), 'refs/pr/3'), stranger=(dict(pulls=[('evil', TITLE, 'open', 'mo')]), ValueError), closed=(dict(pulls=[(BOT, TITLE, 'closed', 'mo')]), ValueError),
    title=(dict(pulls=[(BOT, 'Adding something else', 'open', 'mo')]), ValueError), stale=(dict(pulls=[(BOT, TITLE, 'open', 'x')]), ValueError), empty=(dict(pulls=[(BOT, TITLE, 'open', '')]), ValueError), nothing=({}, ValueError),
    offline=(dict(fails='files'), None), half=(dict(pulls=[GOOD], fails='pulls'), ValueError))

@pytest.mark.parametrize('said,want', SAYS.values(), ids=SAYS)
def test_what_the_hub_says(said, want, hub, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(hub_module, 'HfApi', api := Api(**said))
    if want is ValueError:
        with refuses('^cannot load me/x: its weights are a pickle', COMMAND.format('me/x')): find_conversion('me/x')
    else: assert find_conversion('me/x')==want
    assert api.asked[0]=='files'

def test_a_cache_without_the_hub(tmp_path, hub, monkeypatch):
    "Where the Hub cannot be asked, the cache must do; what is in it is not asked for again."
    both_kinds(tmp_path)
    keep(hub, 'me/x', tmp_path/'x')
    keep(hub, 'me/x', tmp_path/'x-safe', 'refs/pr/1')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    for fails in ('files', 'refs', 'pulls', 'commits'):
        monkeypatch.setattr(hub_module, 'HfApi', Api(fails=fails))
        assert find_conversion('me/x')=='refs/pr/1'
    keep(hub, 'me/y', tmp_path/'x-safe')
    monkeypatch.setattr(hub_module, 'HfApi', api := Api())
    assert find_conversion('me/y') is None and not api.asked


# --- the paper ------------------------------------------------------------------------------

WORDS = '[PAD] [UNK] [CLS] [SEP] [MASK] good fine bad dull the film was plot rather'.split()

def rows(root, task, split, n, rng):
    (root/task.name).mkdir(parents=True, exist_ok=True)
    def row(i): return {c: ' '.join(rng.choices(WORDS[5:], k=rng.randint(2, 9))) for c in task.text} | dict(label=i%task.num_labels)
    pd.DataFrame([row(i) for i in range(n)]).to_parquet(root/task.name/f'{split}.parquet')

def test_reproduce_bert_base(tmp_path, hub, monkeypatch, capsys):
    "From a cache in which one checkpoint is safetensors, two are converted in pull requests, and the rest are pickles alone."
    (tmp_path/'words').mkdir()
    (tmp_path/'words'/'vocab.txt').write_text('\n'.join(WORDS))
    tokenizer, rng, sets = BertTokenizerFast.from_pretrained(tmp_path/'words'), random.Random(0), PAPER_CHECKPOINTS['bert-base']
    size = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    for i, (name, repo) in enumerate(sets.items()):
        task, folder = GLUE[name], tmp_path/name
        for split, n in ((task.train, 24), (task.validation, 12)): rows(tmp_path/'glue', task, split, n, rng)
        torch.manual_seed(i)
        labels = dict(id2label=dict(enumerate(task.labels)), label2id={o: j for j, o in enumerate(task.labels)})
        pickled(folder, BertForSequenceClassification(BertConfig(**size, **labels)), old=True, words=False)
        tokenizer.save_pretrained(folder)
        if name in ('mnli', 'qqp', 'rte'): convert_pickle(folder, tmp_path/f'{name}-safe')
        keep(hub, repo, tmp_path/'mnli-safe' if name=='mnli' else folder)
        if name in ('qqp', 'rte'): keep(hub, repo, tmp_path/f'{name}-safe', 'refs/pr/1')
    monkeypatch.setenv('FISHER_NODES_GLUE', str(tmp_path/'glue'))
    monkeypatch.chdir(tmp_path)
    line = 'reproduce --checkpoints bert-base --methods average,mask-fisher --samples 4 --out results --tasks '
    assert main((line+'mnli,qqp,rte').split())==0
    found = json.loads((tmp_path/'results'/'average-k2.json').read_text())
    assert len(found['groups'])==3
    assert main((line.replace('results', 'other')+'mnli,sst2').split())==2
    assert '`fisher-nodes convert textattack/bert-base-uncased-SST-2 --out DIR` makes safetensors of it' in capsys.readouterr().err
    assert_close(load_model(sets['rte']).classifier.weight, load_model(tmp_path/'rte-safe').classifier.weight, rtol=0, atol=0)

def test_a_folder_that_is_not_there_beside_one_that_is(tmp_path, hub, monkeypatch):
    "It is missed at once; a name is one of the Hub where no such folder is near, or where the cache has it."
    asked = []
    def download(name, file):
        asked.append(name)
        raise OSError('no network')
    monkeypatch.chdir(tmp_path)
    tiny(dtype=torch.float32).save_pretrained('m/a')
    keep(hub, 'm/cached', tmp_path/'m'/'a')
    monkeypatch.setattr(hub_module, 'hf_hub_download', download)
    for run in (merge, lambda o, **how: merge_files(o, out='out', **how), lambda o, **how: load_model(o['b'])):
        with refuses('cannot load m/bb: there is no such folder in m; if a model of the Hub is meant, fetch it'): run(dict(a='m/a', b='m/bb'), method='average')
    assert not asked
    assert hub_module.hub_file('m/cached', 'config.json') is hub_module.hub_file('org/name', 'config.json') is None
    assert asked==['m/cached', 'org/name']


@pytest.mark.parametrize('n', [10**8, 10**13])
def test_a_pickle_holds_what_its_tensors_are(n, tmp_path):
    "A number that is shown many times would be written as many."
    state = pickled(tmp_path/'x', tiny(dtype=torch.float32))
    torch.save(state | dict(big=torch.zeros(1).expand(n)), tmp_path/'x'/'pytorch_model.bin')
    with refuses('pytorch_model.bin', 'big would be'): convert_pickle(tmp_path/'x', tmp_path/'new')
    assert not (tmp_path/'new').exists()
