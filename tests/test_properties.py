"""Arguments by chance, valid and invalid mixed, at every public function: what comes back is right, or one clear line.

`HYPOTHESIS_PROFILE=long` runs 500 an entry point; tests/faults/properties.py does so too, and writes the counts."""
import contextlib, dataclasses, datetime, decimal, fractions, io, json, os, random, shutil, sys, tempfile, warnings
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor, nn
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent/'faults'))
import hostile
import fisher_nodes
import fisher_nodes.app.demo
import fisher_nodes.app.explorer
import fisher_nodes.tasks.finetuning as finetuning
from fisher_nodes import (GLUE, METHODS, SCHEMES, Grams, MaskFisher, Merged, ModelReference, ParameterFisher, Rule, Task, compare, evaluate, explore, finetune,
                          linear_grams, load_task, mask_fisher, merge, merge_files, merge_method, parameter_fisher, predict, read_recipe, reproduce, run_recipe)
from fisher_nodes.app.cli import COMMANDS, main
from fisher_nodes.app.explorer import head_shares, make_choice, plot_winners
from fisher_nodes.core.fisher import ESTIMATORS
from fisher_nodes.engine.models import load_model
from fisher_nodes.engine.reading import parse_yaml
from fisher_nodes.experiment.plots import plot_heads, plot_rows
from fisher_nodes.methods.method import ParameterStatistic, one_line
from reference import brute_mask_fisher, examples, ragged_batches, tiny

os.environ['MPLBACKEND'] = 'Agg'
HOW = dict(deadline=None, print_blob=True, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile('short', max_examples=15, derandomize=True, **HOW)
settings.register_profile('long', max_examples=500, **HOW)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'short'))


# --- a world of whole things, which no call may change --------------------------------------

def broken(model):
    with torch.no_grad(): model.base_model.encoder.layer[1].output.dense.weight[3, 2] = float('nan')
    return model

def mixed(model):
    "In training mode, half of it frozen, one part in evaluation mode."
    model.train().base_model.encoder.layer[0].eval()
    for p in model.base_model.embeddings.parameters(): p.requires_grad_(False)
    return model

MODELS = dict(a=lambda: tiny(num_labels=2, seed=0, dtype=torch.float32), b=lambda: tiny(num_labels=2, seed=1, dtype=torch.float32), c=lambda: tiny(num_labels=3, seed=2),
              numbers=lambda: tiny(num_labels=1, seed=3, dtype=torch.float32), half=lambda: tiny(num_labels=2, seed=4, dtype=torch.bfloat16), mixed=lambda: mixed(tiny(num_labels=2, seed=5, dtype=torch.float32)),
              other=lambda: tiny('roberta', num_labels=2, seed=6, dtype=torch.float32), wide=lambda: tiny(num_labels=2, hidden=32, dtype=torch.float32), nan=lambda: broken(tiny(num_labels=2, dtype=torch.float32)),
              body=lambda: tiny(num_labels=2, seed=7, dtype=torch.float32).base_model, wrapped=lambda: nn.DataParallel(tiny(num_labels=2, dtype=torch.float32)), layer=lambda: nn.Linear(2, 2))
SOUND = ('a', 'b', 'c', 'numbers', 'half', 'mixed')
TEXT = [dict(sentence=s, label=i%2) for i, s in enumerate(['w1 w2 w3', 'w4', 'w5 w6 w7 w8', 'w2 w9', 'w3 w3', 'w1'])]
ROWS = dict(rows=examples(6, 2), three=examples(5, 3), number=examples(5, 1), text=TEXT, pair=[o | dict(sentence2='w4 w5') for o in TEXT], bare=[dict(sentence=o['sentence']) for o in TEXT])

class World:
    "Models, rows, files and Fishers; `work` is the working folder, emptied after every call."
    def __init__(self, root):
        self.root, self.inputs, self.work = root, root/'in', root/'work'
        self.inputs.mkdir()
        hostile.make_sandbox(self.inputs)
        (self.inputs/'r.yml').write_text(hostile.RECIPES[0])
        self.models = {k: f() for k, f in MODELS.items()}
        self.tokenizer = hostile.tokenizer()
        self.rows = {k: Dataset.from_list(o) for k, o in ROWS.items()}
        self.rows['named'] = self.rows['text'].cast_column('label', ClassLabel(names=['no', 'yes']))
        self.batches = ragged_batches(num_labels=2)
        self.fishers = {t: MaskFisher.load(self.inputs/f'{t}.fisher.safetensors') for t in 'ab'}
        own = {t: self.models[t] for t in 'ab'}
        self.own = {t: mask_fisher(m, self.rows['rows'], progress=False) for t, m in own.items()}
        self.parameters = {t: parameter_fisher(m, self.rows['rows'], progress=False) for t, m in own.items()}
        self.grams = {t: linear_grams(m, self.rows['rows'], progress=False) for t, m in own.items()}
        for t, o in self.parameters.items(): o.save(self.inputs/f'{t}.parameters.safetensors')
        self.merged = merge(own, method='average', progress=False)
        self.brute = {k: brute_mask_fisher(self.models['a'], o) for k, o in (('rows', [collated(o) for o in ROWS['rows']]), ('batches', self.batches))}
        self.logits = torch.cat([logits_of(self.models['a'], o) for o in ROWS['rows']])
        evaluate(self.models['a'], self.rows['rows'], progress=False) # imports what draws a random number when it is imported
        self.clean()

    def clean(self):
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        os.chdir(self.work)
        for o in self.inputs.iterdir(): Path(o.name).symlink_to(o)

def collated(row): return {k: torch.tensor([v]) for k, v in row.items()}

@torch.no_grad()
def logits_of(model, row): return model(input_ids=torch.tensor([row['input_ids']])).logits

@contextlib.contextmanager
def a_world():
    "A world in a folder of its own, in which nothing is trained, downloaded or drawn on a screen."
    was = Path.cwd()
    with (tempfile.TemporaryDirectory() as d, warnings.catch_warnings(), mock.patch.object(finetuning, 'train_model', lambda *o, **k: [0.]),
          mock.patch.object(fisher_nodes.app.demo, 'demo', lambda **k: dict(scores={})), mock.patch.object(fisher_nodes.app.explorer, 'as_png', lambda *o: b''), mock.patch.dict(os.environ, FISHER_NODES_GLUE=d)):
        warnings.simplefilter('ignore')
        try: yield World(Path(d).resolve())
        finally: os.chdir(was)

@pytest.fixture(scope='module')
def world():
    with a_world() as o: yield o


# --- values, by name where they are large ---------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Made:
    "Something that is made when it is used, and is short to print."
    kind: str
    args: tuple = ()
    def __repr__(self): return f'{self.kind}{self.args}'

def tensor(world, shape, dtype, value): return torch.full(shape, value).to(getattr(torch, dtype))

def dataset(world, rows):
    try: return Dataset.from_list(rows)
    except Exception: raise UnsatisfiedAssumption from None # what is no table is no data set

def loss(world, kind):
    return dict(good=lambda model, batch: model(**{k: v for k, v in batch.items() if k!='labels'}).logits.square().sum(1), scalar=lambda model, batch: model(**batch).loss, number=lambda model, batch: 1.,
                none=lambda model, batch: None, ids=lambda model, batch: batch['input_ids'], free=lambda model, batch: torch.ones(len(batch['input_ids'])), nothing=lambda: 1)[kind]

def rule(world, kind):
    def good(job, scale:float=1.)->Rule: return Rule(lambda name, tensors: next(iter(tensors)), {})
    def untyped(job, scale=1.): return None
    def required(job, scale:float): return None
    def other(models): return None
    def taken(job, weights:float=1.): return None
    return dict(good=good, untyped=untyped, required=required, other=other, taken=taken)[kind]

MAKERS = dict(model=lambda w, k: w.models[k], folder=lambda w, k: w.inputs/k, rows=lambda w, k: w.rows[k], batches=lambda w: w.batches, stream=lambda w: iter(w.batches), dataset=dataset, tensor=tensor,
              fisher=lambda w, t: w.own[t], stored=lambda w, t: w.fishers[t], parameters=lambda w, t: w.parameters[t], grams=lambda w, t: w.grams[t], merged=lambda w: w.merged, tokenizer=lambda w: w.tokenizer,
              loss=loss, rule=rule, array=lambda w, *o: np.array(o), object=lambda w: io.BytesIO(), reference=lambda w, k, *pins: ModelReference(str(w.inputs/k), *pins), task=lambda w, *o: Task(*o),
              state=lambda w, k: w.models[k].base_model.state_dict(), mask=lambda w, heads, rows: MaskFisher(resolve(w, heads), resolve(w, rows)), data_module=lambda w: sys.modules['datasets'], huge=lambda w: 10**5000)

def resolve(world, o):
    "The value that a description means."
    if isinstance(o, Made): return MAKERS[o.kind](world, *(resolve(world, v) for v in o.args))
    if isinstance(o, dict): return {k: resolve(world, v) for k, v in o.items()}
    return type(o)(resolve(world, v) for v in o) if type(o) in (list, tuple) else o

SPECIAL = ['', ' ', '\0', 'a\x1b[31m\nb\u202e', 'x'*5000, '../x', '.', '..', '~nobody', 'é', '²', 'ﬀ', '\ud800', '{x}', '%s', "'`\"", b'\xff', b'', 1j, decimal.Decimal('NaN'), fractions.Fraction(1, 3),
           datetime.date(2020, 2, 2), ..., int, len, range(3), (), frozenset({1}), 10**30, -10**30, 2**63, 2**31, 1e308, -0., 1e-320, Path('x'), Path(''), True]
plain = st.one_of(st.none(), st.booleans(), st.integers(-3, 5), st.floats(), st.text(max_size=12).map(lambda s: s.replace('/', '_')), st.sampled_from(SPECIAL))
made = st.sampled_from([Made('array', (1, 2)), Made('array', (1.5,)), Made('array'), Made('tensor', ((2,), 'float32', 1.)), Made('tensor', ((), 'int64', 2)), Made('object'), Made('model', ('a',)),
                        Made('model', ('layer',)), Made('rows', ('rows',)), Made('stored', ('a',)), Made('loss', ('good',)), Made('tokenizer'), Made('merged'), Made('data_module'), Made('array', ('x',)), Made('huge')])
keys = st.one_of(st.sampled_from(['a', 'b', 'A', 'c', 'a/b', '..', 'a.json', '', 'x'*300, 'é', 'models']), st.text(max_size=4), st.integers(-2, 2), st.none(), st.booleans(), st.just(('a',)), st.floats())
odd = st.one_of(plain, plain, made, st.lists(plain, max_size=3), st.lists(st.lists(plain, max_size=2), max_size=2), st.dictionaries(keys, plain, max_size=3), st.sets(st.integers(), max_size=2),
                st.dictionaries(st.sampled_from('ab'), st.one_of(plain, made), max_size=2))

@st.composite
def mostly(draw, good, other):
    "The one three times in four."
    return draw(draw(st.sampled_from([good, good, good, other])))

@st.composite
def near(draw, words):
    "A word, or one that a slip of the finger makes of it."
    word = draw(st.sampled_from(sorted(words)))
    i = draw(st.integers(0, len(word)))
    return draw(st.sampled_from([*[word]*12, word[:i]+word[i+1:], word+' ', word.upper(), word.replace('-', '_'), word[:i]+'x'+word[i:], f'{word}\n']))

@st.composite
def cases(draw, required, optional, unknown=False):
    "Arguments: those required, some of the others, up to two of them of any kind, seldom one that there is not."
    names = sorted({*required, *optional})
    case = {k: draw(o) for k, o in required.items()}
    for k in draw(st.lists(st.sampled_from(sorted(optional)), unique=True, max_size=3)) if optional else (): case[k] = draw(optional[k])
    for k in draw(st.lists(st.sampled_from(names), unique=True, max_size=draw(st.sampled_from([0, 0, 0, 1, 1, 2])))): case[k] = draw(odd)
    if unknown and draw(st.sampled_from(range(16)))==9: case[draw(near(names)).strip() or 'x'] = draw(odd)
    return case

def whole(): return mostly(st.sampled_from([1, 2, 5, 100, 10**9, None]), st.sampled_from([0, -1, 2.5, True, '1', 10**30]))
def model(*names): return st.sampled_from([Made('model', (k,)) for k in names])
a_model = st.one_of(model('a'), model(*SOUND), model(*MODELS), st.sampled_from([Made('folder', (k,)) for k in ('a', 'b', 'a-shards', 'merged', 'rows.csv', 'none')]), st.just('a'))
loaded = mostly(model('a'), a_model)
a_task = st.one_of(near(GLUE), st.sampled_from([None, Made('task', ('x', ('sentence',), ('no', 'yes'))), Made('task', ('x', ('sentence',))), Made('task', ('x', (), ('no', 'yes'), ('accuracy', 'f1'))),
                   Made('task', ('x', (), ('no', 'yes'), ('bleu',))), Made('task', ('x', 3, 4)), Made('task', (None, None, None, None))]))
devices = mostly(st.sampled_from(['cpu', None]), st.sampled_from(['cpu:0', 'meta', 'cuda', 'cuda:99', 'CPU', 'gpu', 'xla', 0, -1, 10**30]))
seeds = mostly(st.sampled_from([0, 1, 2**32-1]), st.sampled_from([2**32, -1, True, 1., '1', None, 10**30]))
words = mostly(st.sampled_from(['fp32', 'bf16', None]), st.sampled_from(['tf32', 'fp16', 'FP32', 1]))
columns = st.sampled_from([None, 'sentence', 'sentence', 'sentence2', ['sentence', 'sentence2'], ('sentence',), 'label', 'x', [], [1], ['sentence']*3, {'a': 'sentence'}, 3, '', None])
lengths = mostly(st.sampled_from([1, 2, 8, 10**6, None]), st.sampled_from([0, -1, 2.5, True, '8', {'a': 3}, {'a': None}, {'a': -1}, {'c': 3}, 10**30]))
losses = st.sampled_from([None, *(Made('loss', (k,)) for k in ('good', 'scalar', 'number', 'none', 'ids', 'free', 'nothing'))])
progress = st.just(False)

cell = st.one_of(st.integers(0, 1), st.none(), st.integers(-2, 70), st.floats(), st.text(max_size=3), st.sampled_from([10**18, True, [1], [], {'x': 1}, 'w1', 'yes']))
ids = st.one_of(st.lists(st.integers(5, 59), min_size=1, max_size=8), st.lists(st.integers(-1, 70), max_size=50), st.lists(st.floats(), max_size=3), cell)
row = st.fixed_dictionaries({}, optional=dict(input_ids=ids, attention_mask=st.one_of(st.lists(st.integers(0, 1), max_size=8), cell), labels=cell, label=cell, sentence=cell, sentence2=cell, token_type_ids=ids,
                                              position_ids=ids, inputs_embeds=cell, x=cell, idx=cell))
shapes = st.sampled_from([(2, 5), (2, 5), (2, 1), (0, 5), (2, 0), (5,), (), (2, 5, 16), (2, 41), (1, 2, 3, 4), (3, 5)])
tensors = st.builds(lambda *o: Made('tensor', o), shapes, st.sampled_from(['int64', 'int64', 'int32', 'float32', 'bool', 'uint8', 'complex64', 'bfloat16']), st.sampled_from([1, 7, 0, -1, 60, 10**9, 1.5, float('nan')]))
label = st.builds(lambda *o: Made('tensor', o), st.sampled_from([(2,), (2,), (3,), (2, 1), (2, 2), ()]), st.sampled_from(['int64', 'float32', 'bool']), st.sampled_from([0, 1, 2, -100, float('nan')]))
batch = st.fixed_dictionaries(dict(input_ids=tensors, labels=st.one_of(label, label, odd)), optional=dict(attention_mask=tensors, token_type_ids=tensors, position_ids=tensors, inputs_embeds=tensors, x=plain, label=label, output_attentions=plain))
@st.composite
def slips(draw, rows):
    "Whole rows with a cell or two of any kind."
    rows = [dict(o) for o in rows]
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.sampled_from(rows))
        key = draw(st.sampled_from(sorted(at) or ['x']))
        at[key] = draw(ids if key=='input_ids' else cell)
        if draw(st.sampled_from(range(4)))==3: at.pop(key)
    return Made('dataset', (rows,))

good_data = st.sampled_from([Made('rows', ('rows',)), Made('rows', ('rows',)), Made('batches'), Made('stream'), *(Made('rows', (k,)) for k in (*ROWS, 'named'))])
odd_data = st.one_of(slips(ROWS['rows']), slips(ROWS['text']), slips(ROWS['number']), st.lists(row, min_size=1, max_size=4).map(lambda o: Made('dataset', (o,))), st.lists(st.one_of(batch, batch, odd), max_size=2),
                     batch, st.sampled_from(['rows.csv', 'glue:sst2', 'rows.xml', 'glue:nope']))
data = mostly(good_data, odd_data)


# --- what is right --------------------------------------------------------------------------

def all_of(models): return dict(models) if isinstance(models, Mapping) else {f'task{i}': o for i, o in enumerate(models)}

def loaded_models(models): return {t: load_model(o.name if isinstance(o, ModelReference) else o['model'] if isinstance(o, dict) else o) for t, o in all_of(models).items()}

def right_merge(found, models, method='mask-fisher', weights=None, **how):
    "Heads are kept to the bit, an average is one, Fishers weigh between the models, and all is finite."
    models = loaded_models(models)
    assert list(found)==list(models)
    bodies = {t: dict(m.base_model.named_parameters()) for t, m in models.items()}
    λ = np.array([float(o) for o in (weights.values() if isinstance(weights, Mapping) else weights or [1.]*len(models))])
    if isinstance(weights, Mapping): λ = np.array([float(weights[t]) for t in models])
    for n, p in found.body.named_parameters():
        stack = torch.stack([o[n].detach().double() for o in bodies.values()])
        assert torch.isfinite(p).all(), f'{n} is not finite'
        if method=='average': torch.testing.assert_close(p.detach().double(), torch.einsum('m,m...->...', torch.tensor(λ/λ.sum()), stack), rtol=1e-2 if p.dtype==torch.bfloat16 else 1e-5, atol=1e-2 if p.dtype==torch.bfloat16 else 1e-6)
        if method in ('average', 'mask-fisher', 'full-fisher'):
            room = 1e-2 if p.dtype==torch.bfloat16 else 1e-5
            assert (p>=stack.amin(0)-room).all() and (p<=stack.amax(0)+room).all(), f'{n} leaves its bounds'
    for t, m in models.items():
        for n, p in m.named_parameters():
            if not n.startswith(m.base_model_prefix+'.') and m is not m.base_model: assert torch.equal(found[t].get_parameter(n), p), f'head {n} of {t}'

def right_files(path, world, models, out, **how): right_merge(Merged.from_pretrained(path), models, **how)

def count(data):
    if isinstance(data, Dataset): return len(data)
    return sum(len(o['input_ids']) for o in data) if isinstance(data, list) else None

def expected(data, num_samples): return count(data) if num_samples is None else min(count(data), num_samples)

def right_fisher(found, model, data, num_samples=None, **how):
    "Finite squares in the shape of the model, of as many rows as there are, equal to the slow sum."
    size = 4*2 if isinstance(model, PreTrainedModel) else None
    for k, t in found.tensors().items():
        assert torch.isfinite(t).all() and (k.endswith('matrices') or 'matrices' in k or (t>=0).all()), k
    if count(data) is not None: assert found.num_examples==expected(data, num_samples)
    if size and 'heads.0' in found.tensors(): assert sum(map(len, found.heads))==size and sum(map(len, found.rows))==2*24
    plain_run = not {k for k, v in how.items() if v not in (None, 'paper', 'empirical', False)}-{'seed', 'device', 'progress', 'batch_tokens', 'tokenizer', 'matrices'}
    at = 'batches' if isinstance(data, list) else 'rows'
    return at if plain_run and found.num_examples==count(data) else None

def right_mask(found, world, model, data, **how):
    at = right_fisher(found, model, data, **how)
    if at and model is world.models['a'] and (data is world.batches or data is world.rows['rows']):
        for x, y in zip((found.heads, found.rows), world.brute[at]): torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-10)

def right_statistic(found, world, model, data, **how):
    if count(data) is not None: assert found.num_examples==expected(data, how.get('num_samples'))
    for k, t in found.tensors().items(): assert torch.isfinite(t).all() and (t.diagonal() if isinstance(found, Grams) else t).min()>=0, k

def right_scores(found, world, model, data, task=None, **how):
    assert found and all(type(o) is float and -1<=o<=1 for o in found.values()), found
    if 'accuracy' in found: assert found['accuracy']>=0
    if model is world.models['a'] and data is world.rows['rows'] and not how.get('precision') and task is None:
        assert found['accuracy']==sum(int(o.argmax())==r['labels'] for o, r in zip(world.logits, ROWS['rows']))/6

def right_logits(found, world, model, data, **how):
    assert found.ndim==2 and torch.isfinite(found).all()
    if count(data) is not None: assert len(found)==count(data)
    if model is world.models['a'] and data is world.rows['rows'] and not how.get('precision'): torch.testing.assert_close(found, world.logits, rtol=1e-3, atol=1e-5)

def right_rows(found, world, spec, **how):
    rows, task = found
    assert len(rows) and set(rows.column_names)=={*task.text, 'label'}
    assert all(isinstance(o[c], str) for o in rows for c in task.text)
    assert all(0<=o<len(task.labels) for o in rows['label']) if task.labels else np.isfinite(rows['label']).all()

def right_training(found, world, model, data, out, **how):
    kept = load_model(out)
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), found.parameters())) and not found.training
    source = load_model(model) if not isinstance(model, PreTrainedModel) else model
    mine = source.base_model.state_dict()
    assert all(torch.equal(v, mine[k].float()) for k, v in found.base_model.state_dict().items() if 'pooler' not in k and v.is_floating_point())

def right_recipe(path, world, recipe, **how): assert Merged.from_pretrained(path).recipe['result']

def right_yaml(found, world, text, name): assert same_value(found, yaml.safe_load(text))

def same_value(a, b): return repr(a)==repr(b)

def right_request(found, world, recipe): assert list(found.models) and found.lambdas.sum()>0 and torch.isfinite(found.lambdas).all()

def right_loaded(found, world, path, **how): assert list(found)==list('ab') and found.body is found['a'].base_model

def right_saved(_, world, path, **how):
    again = Merged.from_pretrained(path)
    assert all(torch.equal(p, world.merged.body.get_parameter(n)) for n, p in again.body.named_parameters())

def right_answers(found, world, **inputs): assert set(found)==set('ab') and all(torch.isfinite(o).all() for o in found.values())

def right_statistic_file(found, world, path, **how): assert all(torch.isfinite(t).all() for t in found.tensors().values())

def right_kept(_, world, kind, path): assert all(torch.equal(t, kind.tensors()[k]) for k, t in type(kind).load(path).tensors().items())

def right_shares(found, world, fishers, **how): assert all(torch.allclose(o.sum(0), torch.ones(o.shape[1]).double()) and (o>=0).all() for o in found)

def right_choice(found, world, **how): assert len(found.tasks)>1 and np.isfinite(found.weights).all()

def right_axis(found, world, **how): assert found.get_title()

def right_box(found, world, **how): assert found.explorer.fishers

def right_method(found, world, name, f, **how): assert METHODS[name].rule is f and METHODS[name].options=={'scale': 1.}

def anything(found, world, **how): pass


# --- the entry points -----------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Entry:
    call: object # of the world and the arguments
    right: object # of what came back, the world and the arguments
    arguments: object # a strategy

def function(f): return lambda world, **case: f(**case)

@st.composite
def by_task(draw, value, tasks=st.sampled_from(['ab']*6+['ba', 'a', 'abc'])):
    "A value for each task, as a mapping or a list, or sometimes of something else."
    found = {t: draw(value) for t in draw(tasks)}
    kind = draw(st.sampled_from(range(10)))
    return draw(odd) if kind==0 else list(found.values()) if kind==1 else found

numbers = mostly(st.sampled_from([1, 1., .5, 3, 0, 2.5]), st.sampled_from([1, -1, float('nan'), float('inf'), '1', True, None, 10**400, 1e308, Made('array', (1,))]))
stored = st.sampled_from(['a', 'b', Made('folder', ('a',)), Made('folder', ('b',)), Made('folder', ('a-shards',)), Made('reference', ('a',)), Made('reference', ('b', None, '0'*16)), {'model': 'a'}, 'none', 'user/none', 'merged', 'rows.csv'])
sane = st.sampled_from([{t: Made('model', (t,)) for t in 'ab'}, {t: Made('folder', (t,)) for t in 'ab'}, [Made('model', ('a',)), Made('model', ('mixed',))], dict(a=Made('model', ('c',)), b=Made('model', ('half',)))])
fishers_of = {k: {t: Made(k, (t,)) for t in 'ab'} for k in ('fisher', 'stored', 'parameters', 'grams')} | dict(files={t: f'{t}.fisher.safetensors' for t in 'ab'}, swapped=dict(a=Made('fisher', ('b',)), b=Made('fisher', ('a',))))
needs = st.sampled_from([dict(method='average'), dict(method='average'), dict(fishers=fishers_of['fisher']), dict(method='mask-fisher', fishers=fishers_of['files']), dict(fishers=fishers_of['swapped']),
                         dict(method='full-fisher', fishers=fishers_of['parameters']), dict(method='regmean', fishers=fishers_of['grams']), dict(method='ties', base=Made('model', ('b',))),
                         dict(method='task-arithmetic', base=Made('state', ('a',))), dict(method='dare', base='a', seed=3), dict(data={t: Made('rows', ('rows',)) for t in 'ab'}), dict(method='average', base='a')])
tables = st.one_of(near(SCHEMES), st.dictionaries(st.sampled_from(['query', 'key', 'value', 'intermediate', 'x', 'head']), st.sampled_from(['head', 'row', 'one', 'mean', 'x', None]), max_size=2))
asked = dict(method=near(METHODS), weights=by_task(numbers), seed=seeds, scheme=tables, variant=near(['paper', 'released']), base=st.one_of(a_model, st.just(Made('state', ('a',)))), progress=progress,
             tokenizer=st.sampled_from([None, Made('tokenizer')]), density=numbers, scale=numbers, off_diagonal=numbers, options=odd)
measured = dict(data=by_task(data), num_samples=whole(), max_length=lengths, text=columns, label=columns, labels=near(ESTIMATORS), precision=words, loss=losses, device=devices)
outs = st.sampled_from(['new', 'new', 'new', 'new', Made('folder', ('../work/new',)), 'a', 'merged', 'deep/er/new', 'rows.csv', '.'])
writing = dict(max_shard_size=st.sampled_from(['5GB', '10KB', 10**6, 10**5, 1, 0, -1, 'x', '1', '5 GB', 2.5, None, '1e999GB', float('nan'), '9'*5000+'GB']), overwrite=st.sampled_from([True, False, False, None]))

@st.composite
def merging(draw, models, more, required={}):
    others = asked | more | dict(fishers=st.sampled_from([*fishers_of.values()]))
    if draw(st.sampled_from([1, 1, 1, 0])): others = {k: v for k, v in others.items() if k in ('weights', 'seed', 'tokenizer', 'variant', *writing, 'threads', 'device')}
    return draw(needs) | draw(cases(dict(models=models, progress=progress) | required, others, unknown=True))

run_how = dict(num_samples=whole(), seed=seeds, precision=words, tokenizer=st.sampled_from([None, Made('tokenizer'), Made('tokenizer')]), max_length=lengths, text=columns, batch_tokens=whole(), device=devices)
score_how = {k: v for k, v in run_how.items() if k not in ('num_samples', 'seed')}
fisher_how = dict(variant=near(['paper', 'released']), labels=near(ESTIMATORS), loss=losses, matrices=st.sampled_from([None, 'heads', 'all', 'rows', 1]))
measuring = dict(model=loaded, data=data, progress=progress)

lines = st.lists(st.lists(st.sampled_from(['w1 w2', 'w3', '1', '0', '', '-1', '1.5', 'nan', 'x', '"', 'a,b', '9'*30, '\0', 'é', '\r', "'", 'yes', 'no', ' ', 'null', '1e999']), min_size=1, max_size=3), min_size=0, max_size=6)
heads = st.sampled_from(['sentence,label', 'sentence,label', 'text,label', 'sentence1,sentence2,label', 'label', 'x,y', 'label,label', '', 'sentence,labels', 'sentence', 'sentence,label,label_text', 'premise,label,hypothesis'])
def as_csv(head, rows, tab): return '\n'.join([head, *(','.join(o) for o in rows)]).replace(',', '\t' if tab else ',')
def as_json(rows): return '\n'.join(json.dumps(o) for o in rows)
texts = mostly(st.builds(as_csv, st.just('sentence,label'), st.lists(st.tuples(st.sampled_from(['w1', 'w2 w3', 'é']), st.sampled_from('011')), min_size=2, max_size=6), st.just(False)), st.one_of(st.builds(as_csv, heads, lines, st.booleans()),
                  st.lists(st.fixed_dictionaries({}, optional=dict(sentence=cell, label=cell, text=cell, labels=cell)), max_size=4).map(as_json),
                  st.lists(st.fixed_dictionaries(dict(sentence=st.sampled_from(['w1', 'w2 w3']), label=st.integers(0, 1))), min_size=2, max_size=4).map(as_json), st.text(max_size=20)))

def load_file(world, file, holds, **how):
    "The rows of a file of that name and text."
    (world.work/file).write_bytes(holds.encode('utf-8', 'surrogatepass'))
    return load_task(**how)

names_of_files = st.sampled_from([*['t.csv']*9, 't.tsv', 't.jsonl', 't.json', 't.parquet', 't.csv.gz', 't'])
@st.composite
def specs(draw):
    name = draw(names_of_files)
    spec = draw(st.sampled_from([name]*20+['glue:sst2', 'glue:nope', 'none.csv', 'a', 'rows.csv', 'rows.jsonl']))
    return draw(cases(dict(spec=st.just(spec)), dict(split=st.sampled_from(['train', 'validation', 'test', '']), labels=mostly(st.sampled_from([['no', 'yes'], ['0', '1'], ()]), st.sampled_from([['no', 'no'], ['yes'], [1, 2], 'no', 3])), text=columns, label=mostly(st.sampled_from([None, 'label']), columns),
                                                     recorded=st.sampled_from([(), ('sentence',), ['x'], 'x', None])))) | dict(file=name, holds=draw(texts))

training = dict(task=a_task, validation=data, text=columns, tokenizer=run_how['tokenizer'], epochs=numbers, learning_rate=numbers, batch_size=whole(), num_layers=whole(), precision=words, max_length=lengths,
                num_samples=whole(), seed=seeds, device=devices, overwrite=writing['overwrite'], progress=progress)

entry = mostly(st.sampled_from(['./a', './b', 'a', './none', 'user/none', '', None, 3, 1.5, ['a'], {'model': './a'}, {'model': './b', 'weight_hash': '0'*16}, {'x': 1}, True, './rows.csv', 'x'*300]), plain)
@st.composite
def recipes(draw):
    "A recipe with a place or two changed."
    found = yaml.safe_load(draw(st.sampled_from(hostile.RECIPES)))
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.sampled_from([*hostile.places(found)][1:]))
        try: hostile.put(found, at, draw(st.one_of(entry, st.lists(plain, max_size=2), st.dictionaries(st.text(max_size=3), plain, max_size=2))))
        except (TypeError, KeyError, IndexError): pass
    if draw(st.sampled_from(range(4)))==3: found[draw(near([*asked, 'num_samples', 'data', 'fishers', 'result', 'versions']))] = draw(entry)
    return found

def write_recipe(world, recipe):
    path = world.work/'own.yml'
    for o in ('a', 'b', 'rows.csv', 'a.fisher.safetensors', 'b.fisher.safetensors'): assert (world.work/o).exists()
    path.write_bytes(written(recipe).encode('utf-8', 'surrogatepass'))
    return path

def repeat(world, recipe, out, **how): return run_recipe(write_recipe(world, recipe), out, **how)

def read(world, recipe): return read_recipe(write_recipe(world, recipe) if isinstance(recipe, dict) else recipe)

def written(recipe):
    try: text = yaml.safe_dump(recipe, allow_unicode=True)
    except (yaml.YAMLError, TypeError, ValueError): raise UnsatisfiedAssumption from None
    return text

yaml_texts = st.one_of(st.sampled_from(hostile.YAML), recipes().map(written), st.text(max_size=30),
                       st.text('[]{}:-,&*!"\'#|> \na0.x', max_size=30))

def reload(world, path, **how): return Merged.from_pretrained(path, **how)

def save(world, path, **how):
    merged = Merged(world.merged.body, dict(world.merged), dict(world.merged.report), world.merged.tokenizer, world.merged.recipe)
    merged.save_pretrained(path, **how)

def answer(world, **inputs): return world.merged.logits(**inputs)

def keep(world, kind, path): return kind.save(path)

@st.composite
def masks(draw):
    "A Fisher of odd shapes."
    def layers(n): return draw(mostly(st.sampled_from([Made('tensor', ((2, n), 'float32', 1.)), Made('tensor', ((2, n), 'float32', 0.)), Made('tensor', ((1, n), 'float32', 1.)), Made('tensor', ((2,), 'float32', 1.)),
        Made('tensor', ((2, n), 'float32', float('nan'))), Made('tensor', ((2, n), 'float32', -1.)), Made('tensor', ((2, n), 'int64', 1)), Made('tensor', ((0, n), 'float32', 1.)), Made('tensor', ((2, n, 1), 'float32', 1.)),
        (Made('tensor', ((n,), 'float32', 1.)), Made('tensor', ((n-1,), 'float32', 1.)))]), plain))
    def layers_mostly(n): return draw(st.booleans()) and Made('tensor', ((2, n), 'float64', 2.)) or layers(n)
    return Made('mask', (layers_mostly(4), layers_mostly(24)))

some_fishers = mostly(st.sampled_from([fishers_of['fisher'], fishers_of['stored'], fishers_of['files']]), st.one_of(st.just(fishers_of['parameters']), st.dictionaries(st.sampled_from('ab'), masks(), min_size=1, max_size=2), by_task(mostly(masks(), odd))))
some_weights = st.one_of(by_task(numbers), st.none())

@st.composite
def merges_of_fishers(draw):
    "Fishers that were not measured, but made."
    models = st.sampled_from([{t: Made('model', (t,)) for t in 'ab'}])
    return draw(cases(dict(models=models, fishers=st.dictionaries(st.sampled_from('ab'), st.one_of(masks(), st.just(Made('fisher', ('a',)))), min_size=2, max_size=2), progress=progress), dict(weights=asked['weights'], scheme=tables, variant=asked['variant'])))

def close_figures():
    plt = sys.modules.get('matplotlib.pyplot')
    if plt: plt.close('all')

def register(world, name, f, **needs):
    was = dict(METHODS)
    try:
        found = merge_method(name, **needs)(f)
        assert METHODS[name].rule is f and 'scale' in METHODS[name].options
        return found
    finally:
        METHODS.clear()
        METHODS.update(was)

WORDS = [o for o in hostile.WORDS if not o.startswith('9'*50)] + ['--epochs', '--learning-rate', '--batch-size', '--num-layers', '--glue', '--validation', '--checkpoints', '--methods', '--samples', '--seeds', '--group-sizes', '--tasks', '--limit',
         '--label-order', '--rounds', '--partial', '--text', '--label', 'label', 'sentence', '1,2', '1,x', ',', 'a=1,0', 'mnli=2,0,1', 'inf', '--help', '--version', '9'*400, '0.5', '1e-5', 'rte', 'a=b', '\u202e', '\ud800', '--out=new', '--seed=-1']
LINES = [*(o for o in hostile.LINES if '--update-card' not in o), # which changes a folder that is there
         'finetune a --data rows.csv --out new', 'finetune a --data rows.csv --validation rows.csv --epochs 1 --out new', 'finetune a --glue rte --out new', 'reproduce --checkpoints bert-tiny --out new',
         'reproduce --checkpoints a --methods average --samples 2 --seeds 1 --out new', 'report none', 'demo --out new', 'fisher a --data rows.jsonl --labels exact --out new.safetensors', 'merge a=a b=b --method average --json --out new',
         'mergekit r.yml new', 'verify merged', 'verify merged --inputs a b --repeat --json', 'describe a', 'describe a --check --json', 'convert a --out new', 'convert a --out new --overwrite --json']

@st.composite
def word_lists(draw, command):
    "A line that works, or nearly does, with some words of it changed."
    line = draw(st.sampled_from([o for o in LINES if o.split()[0]==command])).split()
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3]))):
        i = draw(st.integers(1, max(1, len(line)-1)))
        what = draw(st.sampled_from(range(5)))
        new = draw(st.one_of(st.sampled_from(WORDS), st.sampled_from(WORDS), near(WORDS), st.text(max_size=6).map(lambda s: s.replace('/', '_'))))
        if what<2: line[i:i+1] = [new]
        elif what==2: del line[i:i+1]
        else: line[i:i] = [new, draw(st.sampled_from(WORDS))][:what-2]
    return dict(argv=line)

class Refused(Exception):
    "What the command line said, and its status."

def shell(world, argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: status = main(argv)
        except SystemExit as e: status = e.code
    said = err.getvalue()
    if status: raise Refused(status, said)
    return out.getvalue(), said

def right_output(found, world, argv):
    out, said = found
    assert 'Traceback' not in said and all(hostile.is_line(o) for o in said.splitlines() if o.startswith('fisher-nodes '))
    if '--json' in argv and out.startswith('{'): json.loads(out)

def right_comparison(found, world, models, **how):
    assert found.winner in found.scores and all(0 <= v <= 1 for o in found.scores.values() for v in o.values()) and max(map(len, str(found).splitlines())) <= 80

def ask_merged(world, **how): return Merged.from_pretrained('merged').predict(**how)

def right_answer(found, texts, **how):
    assert all(len(o) == (1 if isinstance(texts, str) else len(texts)) and all(0 <= a['score'] <= 1 and a['label'] for a in o) for o in found.values())

def of(f, required, optional={}, right=anything, unknown=False): return Entry(function(f), right, cases(required, optional, unknown))

mapping_or_pair = mostly(sane, by_task(loaded))
ENTRIES = dict( # what is called, what is right of it, and what it is given
    merge=Entry(function(merge), lambda o, w, **how: right_merge(o, **how), merging(mapping_or_pair, measured)),
    merge_of_made_fishers=Entry(function(merge), lambda o, w, **how: right_merge(o, **how), merges_of_fishers()),
    merge_files=Entry(function(merge_files), right_files, merging(mostly(st.just(dict(a='a', b='b')), by_task(stored)), writing | dict(threads=whole(), device=devices, num_samples=whole(), data=data), dict(out=outs))),
    mask_fisher=of(mask_fisher, measuring, run_how | fisher_how, right_mask, True),
    parameter_fisher=of(parameter_fisher, measuring, run_how | dict(labels=fisher_how['labels'], loss=losses, one_at_a_time=st.booleans()), right_statistic, True),
    linear_grams=of(linear_grams, measuring, run_how, right_statistic, True),
    evaluate=of(evaluate, measuring, score_how | dict(task=a_task), right_scores),
    predict=of(predict, measuring, score_how, right_logits),
    compare=of(compare, dict(models=mapping_or_pair, data=by_task(data), methods=st.lists(st.one_of(st.just('average'), near(METHODS)), max_size=2), progress=progress), dict(held_out=by_task(data), share=numbers, seed=seeds,
                num_samples=whole(), limit=whole(), base=a_model, max_length=whole(), text=words, label=words, device=devices, precision=words), right_comparison),
    ask_merged=Entry(ask_merged, lambda o, w, **how: right_answer(o, **how), cases(dict(texts=st.one_of(st.lists(st.text(max_size=8), max_size=3), st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=2), odd)),
                     dict(tasks=st.one_of(st.lists(st.sampled_from(['a', 'b', 'c']), max_size=2), odd), max_length=whole(), batch_tokens=whole(), device=devices, precision=words))),
    load_task=Entry(load_file, lambda o, w, file, holds, **how: right_rows(o, w, **how), specs()),
    finetune=of(finetune, dict(model=loaded, data=data, out=outs, progress=progress), training, right_training),
    run_recipe=Entry(repeat, right_recipe, cases(dict(recipe=recipes(), out=mostly(st.just('new'), outs), progress=progress), dict(overwrite=writing['overwrite'], device=devices, accept_changes=st.booleans()))),
    read_recipe=Entry(read, right_request, cases(dict(recipe=st.one_of(recipes(), st.sampled_from(['r.yml', 'none.yml', 'a', 'rows.csv', Path('r.yml')]))), {})),
    parse_yaml=of(parse_yaml, dict(text=yaml_texts, name=st.just('r.yml')), right=right_yaml),
    from_pretrained=Entry(reload, right_loaded, cases(dict(path=st.sampled_from(['merged', Made('folder', ('merged',)), 'a', 'none', 'user/none', 'rows.csv', '.', 'merged/a', 'x y', 'a/b/c'])), dict(revision=st.sampled_from(['main', 'x', '', None]), token=st.sampled_from([None, False, 'x'])))),
    save_pretrained=Entry(save, right_saved, cases(dict(path=outs), writing | dict(scores=by_task(st.one_of(st.dictionaries(st.sampled_from(['accuracy', 'f1', '', 'x\ny']), numbers, max_size=2), odd)), repo_id=st.sampled_from(['user/name', 'name', 'a/b/c', '', '../x', 'x y', None])))),
    logits=Entry(answer, right_answers, cases(dict(input_ids=mostly(st.just(Made('tensor', ((2, 5), 'int64', 7))), tensors)), dict(attention_mask=tensors, token_type_ids=tensors))),
    save_statistic=Entry(keep, right_kept, st.fixed_dictionaries(dict(kind=st.sampled_from([Made('fisher', ('a',)), Made('parameters', ('a',)), Made('grams', ('b',))]), path=st.one_of(st.sampled_from(['new.safetensors', 'new.safetensors', 'a', 'none/new', 'new', '', '.']), odd)))),
    mask_fisher_by_hand=of(MaskFisher, dict(heads=st.sampled_from([Made('tensor', ((2, 4), 'float32', 1.))]), rows=st.sampled_from([Made('tensor', ((2, 24), 'float32', 1.))])), dict(num_examples=whole(), meta=odd)),
    load_mask_fisher=of(MaskFisher.load, dict(path=st.sampled_from(['a.fisher.safetensors', 'a.parameters.safetensors', 'a', 'rows.csv', 'a/model.safetensors', 'none', '.'])), right=right_statistic_file),
    load_parameter_fisher=of(ParameterFisher.load, dict(path=st.sampled_from(['a.fisher.safetensors', 'a.parameters.safetensors', 'a', 'rows.csv', 'a/model.safetensors', 'none', '.'])), right=right_statistic_file),
    explore=of(explore, dict(fishers=some_fishers), dict(models=by_task(loaded), validation=by_task(data), tasks=by_task(a_task), tokenizer=run_how['tokenizer'], num_samples=whole(), seed=seeds, device=devices, log=st.booleans()), right_box),
    head_shares=of(head_shares, dict(fishers=fishers_of and st.sampled_from([fishers_of['fisher'], fishers_of['stored']])), dict(weights=some_weights, scheme=tables), right_shares),
    make_choice=of(make_choice, dict(known=st.sampled_from([['a', 'b'], ['a', 'b', 'c']])), dict(tasks=st.sampled_from([['a', 'b'], 'ab', ['a'], ['x'], [], None, ['a', 'a']]), weights=some_weights, scheme=near(SCHEMES)), right_choice),
    plot_winners=of(plot_winners, dict(fishers=some_fishers), dict(weights=some_weights, scheme=tables), right_axis),
    plot_heads=of(plot_heads, dict(fisher=st.one_of(masks(), st.just(Made('fisher', ('a',))))), dict(title=st.text(max_size=5), bar=st.booleans()), anything),
    plot_rows=of(plot_rows, dict(fishers=some_fishers), {}, right_axis),
    merge_method=Entry(register, anything, cases(dict(name=st.one_of(near(METHODS), st.text(min_size=1, max_size=6)), f=st.sampled_from([Made('rule', (k,)) for k in ('good', 'good', 'untyped', 'required', 'other', 'taken')])),
                                                 dict(statistic=near(['mask-fisher', 'full-fisher', 'grams']), needs_base=st.booleans(), random=st.booleans()))),
    reproduce=of(reproduce, dict(checkpoints=st.sampled_from(['a', 'none', 'bert-tiny', 'merged', '.', 'rows.csv']), out=st.just('new')), dict(methods=st.lists(near(METHODS), max_size=2), samples=st.lists(whole(), max_size=2), seeds=st.lists(whole(), max_size=2),
                 group_sizes=st.lists(whole(), max_size=2), tasks=st.lists(near(GLUE), max_size=2), base=a_model, limit=whole(), label_orders=by_task(st.lists(st.integers(-1, 3), max_size=3)), device=devices, precision=words)),
    **{f'shell_{c}': Entry(shell, right_output, word_lists(c)) for c in COMMANDS})


# --- one call -------------------------------------------------------------------------------

def mark(o, seen=()):
    "Something that changes if the value does."
    if id(o) in seen: return 'again'
    seen = (*seen, id(o))
    if isinstance(o, Tensor): return str(o.dtype), tuple(o.shape), o.requires_grad, o.grad is None, o.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if o.numel() else b''
    if isinstance(o, nn.Module):
        flags = [(n, m.training, sorted(m.__dict__), *(len(getattr(m, k)) for k in ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks'))) for n, m in o.named_modules()]
        config = o.config.to_dict() if hasattr(o, 'config') else None
        return flags, repr(config), [(n, mark(t)) for n, t in o.state_dict(keep_vars=True).items()]
    if isinstance(o, Merged): return mark(o.body), {t: mark(m) for t, m in o.items()}, repr(o.report), repr(o.recipe)
    if isinstance(o, (MaskFisher, ParameterStatistic)): return repr(o.meta), [mark(v, seen) for v in (vars(o).get('kinds') or vars(o).get('values')).values()]
    if isinstance(o, Dataset): return o._fingerprint, repr(o.format), o.num_rows
    if isinstance(o, Mapping): return [(repr(k), mark(v, seen)) for k, v in o.items()]
    if isinstance(o, (list, tuple)): return [mark(v, seen) for v in o]
    return o.tobytes() if isinstance(o, np.ndarray) else type(o).__name__ if hasattr(o, '__next__') or type(o) is int else repr(o)[:1000]

def listing(world): return {str(o): (o.lstat().st_mtime_ns, o.lstat().st_size) for o in world.inputs.rglob('*')}

def surroundings():
    return dict(torch=torch.get_rng_state().numpy().tobytes(), numpy=np.random.get_state()[1].tobytes(), random=random.getstate(), grad=torch.is_grad_enabled(), precision=torch.get_float32_matmul_precision(),
            dtype=torch.get_default_dtype(), threads=torch.get_num_threads(), methods=sorted(METHODS), folder=os.getcwd(), autocast=torch.is_autocast_enabled())

PARTS = ('label', 'Model', 'model', 'batch', 'method', 'task', 'Fisher of') # what is given has, and an error may speak of

def said_of(o):
    "Words that name an argument, or what was given for it."
    if isinstance(o, dict): return [w for k, v in o.items() for w in (*said_of(k), *said_of(v))]
    if not isinstance(o, (str, Path)): return []
    shown = one_line(o)
    return [f'{shown} ', f'{shown}:'] if len(shown)<2 else [str(o), shown]

def is_refusal(e, case):
    "Whether an error is one of ours, in one line that names something given; Python itself says which argument there is not."
    if isinstance(e, Refused):
        status, said = e.args
        return status==2 and hostile.is_clear_line(said, status)
    if type(e) is TypeError and 'unexpected keyword argument' in str(e): return hostile.is_line(str(e))
    return hostile.is_clear(e, (*hostile.NAMED, *PARTS, *said_of(case)))

def call(world, name, case):
    "What came of one call: `fine` or `clear`; else `unclear`, `wrong` or `changed`, and what was said."
    entry = ENTRIES[name]
    case = case | {k: 'new' for k in ('out', 'path') if case.get('overwrite') and case.get(k)=='merged'} # it is an input of the others
    try: args = resolve(world, case)
    except (ValueError, TypeError) as e: return ('clear' if is_refusal(e, case) else 'unclear'), f'{type(e).__name__}: {e}{trace(e)}'
    before, files, around = mark(args), listing(world), surroundings()
    try:
        found = entry.call(world, **args)
        try: entry.right(found, world, **args); outcome = 'fine', ''
        except Exception as e: outcome = 'wrong', f'{type(e).__name__}: {e}'
    except BaseException as e:
        if isinstance(e, (KeyboardInterrupt, UnsatisfiedAssumption)): raise
        outcome = ('clear' if is_refusal(e, case) else 'unclear'), f'{type(e).__name__}: {e}{trace(e)}'
    finally: close_figures()
    after = mark(args), listing(world), surroundings()
    for what, x, y in zip(('an argument', 'an input file', 'the state of a library'), (before, files, around), after):
        if x!=y: outcome = 'changed', f'{what}, {[k for k in {**x, **y} if x.get(k)!=y.get(k)] if isinstance(x, dict) else ""}: {outcome}'
    world.clean()
    return outcome

def trace(e):
    "Where it was raised."
    last, where = e.__traceback__, []
    while last:
        code = last.tb_frame.f_code
        where.append(f'{Path(code.co_filename).name}:{last.tb_lineno} {code.co_name}')
        last = last.tb_next
    return ' | '+' < '.join(reversed(where[-6:]))

GOOD = ('fine', 'clear')

@pytest.mark.parametrize('name', ENTRIES)
def test_what_is_given_is_answered_or_refused(name, world):
    @given(ENTRIES[name].arguments)
    def answered_or_refused(case):
        outcome, said = call(world, name, case)
        assert outcome in GOOD, f'{outcome}: {said}'
    answered_or_refused()
