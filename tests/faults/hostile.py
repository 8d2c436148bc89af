"""Hostile inputs at every door, each in a forked child with 10 seconds of work and 1 GB, sorted by what came of it.

`python tests/faults/hostile.py --out FILE` runs 500 a door and writes the counts; tests/test_hostile.py runs a seeded sample.
A case is a door (what is called), a kind (which file is wrong) and a seed; the same three give the same input again."""
import argparse, json, os, pickle, random, re, resource, select, shlex, shutil, signal, socket, struct, sys, tempfile, time, traceback, zipfile
from collections import Counter
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

import pandas as pd
import torch
torch.set_num_threads(1)
import transformers
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models as words, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fisher_nodes
from fisher_nodes import Merged, evaluate, mask_fisher, merge, merge_files, reproduce, run_recipe
from fisher_nodes.app.cli import main
from fisher_nodes.engine.files import find_commit, versions, write_record
from fisher_nodes.engine.pickles import convert_pickle
from fisher_nodes.experiment.report import report
from fisher_nodes.experiment.results import commands, load_bench, load_errors, load_results, provenance
from fisher_nodes.tasks.tasks import GLUE
from reference import examples, tiny

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SECONDS, PATIENCE, BYTES = 10, 60, 2**30 # of work, of waiting on a busy machine, of memory
GOOD = ('fine', 'clear')
OUTCOMES = (*GOOD, 'unclear', 'hang', 'memory', 'wrote outside', 'read outside', 'ran code', 'disagree', 'killed')
SECRET = 'canary-7f3a91'


# --- a sandbox of whole models, of which each case takes a copy -----------------------------

def tokenizer():
    vocab = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *(f'w{i}' for i in range(55))]
    inner = Tokenizer(words.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token='[UNK]'))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(pad='[PAD]', unk='[UNK]', cls='[CLS]', sep='[SEP]', mask='[MASK]')
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{f'{k}_token': v for k, v in names.items()})

CARD = '---\nlicense: mit\nlanguage: en\ndatasets: [glue]\n---\n# A model\n'
MODULES = [dict(path=p, type=f'sentence_transformers.models.{k}') for p, k in (('', 'Transformer'), ('1_Pooling', 'Pooling'))]

def make_sandbox(here):
    "Two models, sharded ones, Fishers, rows, a recipe and a merge of them."
    rows = [f'{"w1 w2 w3" if i%2 else "w4 w5"},{i%2}' for i in range(12)]
    models = {t: tiny(num_labels=2, seed=i, dtype=torch.float32) for i, t in enumerate('ab')}
    for t, m in models.items():
        m.save_pretrained(here/t)
        tokenizer().save_pretrained(here/t)
        (here/t/'README.md').write_text(CARD)
        (here/t/'modules.json').write_text(json.dumps(MODULES))
        (here/t/'1_Pooling').mkdir()
        (here/t/'1_Pooling'/'config.json').write_text('{"pooling_mode_mean_tokens": true}')
        m.save_pretrained(here/f'{t}-shards', max_shard_size='20KB')
    (here/'rows.csv').write_text('sentence,label\n'+'\n'.join(rows)+'\n')
    (here/'rows.jsonl').write_text('\n'.join(json.dumps(dict(sentence=a, label=int(b))) for a, b in (o.split(',') for o in rows)))
    for t in 'ab': mask_fisher(models[t], Dataset.from_list(examples(6, 2)), progress=False).save(here/f'{t}.fisher.safetensors')
    merge({t: here/t for t in 'ab'}, method='average').save_pretrained(here/'merged')

def make_pickles(here):
    "A checkpoint from before safetensors, whole and in parts; and a folder of an earlier conversion."
    for folder, parts in (('p', 1), ('q', 2)):
        state = list(tiny(num_labels=2, dtype=torch.float32).state_dict().items())
        (here/folder).mkdir()
        for o in (here/'a').glob('*.json'): shutil.copy(o, here/folder)
        names = ['pytorch_model.bin'] if parts == 1 else [f'pytorch_model-0000{i+1}-of-00002.bin' for i in range(2)]
        for i, name in enumerate(names): torch.save(dict(state[i::parts]), here/folder/name)
        if parts > 1: (here/folder/'pytorch_model.bin.index.json').write_text(json.dumps(dict(metadata={}, weight_map={n: names[i%2] for i, (n, _) in enumerate(state)})))
    convert_pickle(here/'p', here/'old')

def make_adapters(here):
    "An adapter of model a for each task, which names its base by a path from here."
    from peft import LoraConfig, get_peft_model
    for t in 'ab':
        config = LoraConfig(task_type='SEQ_CLS', r=2, target_modules=['query'], init_lora_weights=False)
        get_peft_model(tiny(num_labels=2, dtype=torch.float32), config).save_pretrained(here/f'l{t}')
        path = here/f'l{t}'/'adapter_config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(base_model_name_or_path='a')))

def results(label, ways=2):
    "Files of results as `reproduce` leaves them, of one way to merge or two."
    about = dict(limit=2, device='cpu', versions=versions(), date='today', commit=None)
    own = {t: dict(weight_hash=t, scores=dict(accuracy=.9), majority=.5) for t in ('rte', 'sst2')}
    cell = dict(about, group_size=2, models={t: t for t in own}, groups={'rte+sst2': dict(scores={t: dict(accuracy=.8) for t in own})})
    made = {'average-k2': dict(cell, name='average', num_samples=None, seed=None), 'mask-fisher-k2-n2-s0': dict(cell, name='mask-fisher', num_samples=2, seed=0)}
    return dict(own=dict(about, checkpoints=label, models=own), **dict(list(made.items())[:ways]))

def put_results(folder, files):
    folder.mkdir(parents=True)
    for name, o in files.items(): (folder/f'{name}.json').write_text(json.dumps(o))

STEP = dict(what='mask Fisher', seconds=1.5, num_examples=8, labels='empirical', precision=None, device='cpu', model='toy', examples='one at a time', batch_tokens=64)

def make_results(here):
    "Results, the errors of Fishers, an earlier page of them, and timings."
    error = dict(task='rte', name='mask-fisher', variant='paper', num_samples=2, seed=0, reference=4, heads=.1, rows=.1, heads_rank=.9, rows_rank=.9)
    put_results(here/'results', results('two tasks') | dict(fisher_error=dict(errors=[error])))
    put_results(here/'bench', dict(cost=dict(model='toy', steps=[STEP, STEP | dict(what='full Fisher', batch=1)])))
    put_results(here/'plain', results('one way', 1))
    report(here/'plain', here/'old-page')

def make_grid(here):
    "Checkpoints of two tasks, and rows in GLUE's columns."
    for i, t in enumerate(('sst2', 'rte')):
        model = tiny(num_labels=2, seed=i, dtype=torch.float32)
        model.config.id2label, model.config.label2id = dict(enumerate(GLUE[t].labels)), {o: k for k, o in enumerate(GLUE[t].labels)}
        model.save_pretrained(here/'models'/t)
        tokenizer().save_pretrained(here/'models'/t)
        (here/'glue'/t).mkdir(parents=True)
        for split in ('train', 'validation'):
            pd.DataFrame([{c: f'w{k} w{k+3}' for c in GLUE[t].text} | dict(label=k%2) for k in range(6)]).to_parquet(here/'glue'/t/f'{split}.parquet')

def go_on(here):
    "Go on with a run; the exit status."
    with mock.patch.dict(os.environ, FISHER_NODES_GLUE='glue'):
        return main('reproduce --checkpoints models --tasks sst2,rte --methods average,mask-fisher --samples 2 --out done'.split())

def make_run(here):
    "What `reproduce` left when it was stopped: all but one file."
    make_grid(here)
    with mock.patch.dict(os.environ, FISHER_NODES_GLUE=str(here/'glue')):
        reproduce(here/'models', here/'done', tasks=('sst2', 'rte'), methods=('average', 'mask-fisher'), samples=(2,))
    (here/'done'/'mask-fisher-k2-n2-s0.json').unlink()

def outside(here): return here.parent/'outside'


# --- what is done to a file -----------------------------------------------------------------

DEEP = '['*3000 + ']'*3000
VALUES = [None, '', 'x', -1, 0, 1, 2, 10**9, 10**12, 10**30, 1.5, float('nan'), float('inf'), True, [], {}, [1, 2], {'a': 1}, {'0': 'x', '7': 'y'},
          ['x'*50]*50, 'x'*10**5, 'a\x1b[31m\nb\u202e', '../outside/secret.json', '/etc/passwd', 'x/y--code.Evil', '<script>alert(1)</script>|`[a](b)',
          {'a': {'b': {'c': [[[[1]]]]}}}]
RAW = ['', ' ', 'null', '[]', '{}', '3', '"x"', '{', '{"a": ', DEEP, '{"a": '+DEEP+'}', '{"a": '+'9'*5000+'}', '\ufeff{}', '{"a": 1, "a": 2}', '\x00', '[1, 2]',
       'version https://git-lfs.github.com/spec/v1\noid sha256:'+'a'*64+'\nsize 1234\n', '{"a": NaN}', 'x'*10**6]
BYTES_ = [b'\xff\xfe{}\x00', b'\x80\x04\x95', os.urandom(200), b'PK\x03\x04'+b'0'*100, b'\x00'*1000, b'\xff'*64]

SPECIAL = ['pipe', 'folder', 'socket', 'zero', 'dangling', 'loop', 'none', 'link', 'etc']

def special(path, r, here, kinds=SPECIAL):
    "Something that is no file, or lies elsewhere."
    kind = r.choice(kinds)
    path.unlink(missing_ok=True)
    if kind == 'pipe': os.mkfifo(path)
    elif kind == 'folder': path.mkdir()
    elif kind == 'socket':
        where = os.getcwd()
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as s: s.bind(path.name)
        os.chdir(where)
    elif kind == 'zero': path.symlink_to('/dev/zero')
    elif kind == 'link': path.symlink_to(outside(here)/'secret.json')
    elif kind == 'dangling': path.symlink_to('nowhere')
    elif kind == 'loop': path.symlink_to(path.name)
    elif kind == 'etc': path.symlink_to('/etc/hostname')
    return kind

def places(o, at=()):
    "Every place in a JSON value."
    yield at
    if isinstance(o, dict): yield from (p for k, v in o.items() for p in places(v, (*at, k)))
    elif isinstance(o, list): yield from (p for i, v in enumerate(o[:20]) for p in places(v, (*at, i)))

def put(o, at, value):
    for k in at[:-1]: o = o[k]
    o[at[-1]] = value

def drop(o, at):
    for k in at[:-1]: o = o[k]
    del o[at[-1]]

def mutate_json(path, r, here, extra=()):
    "One to three places changed, removed or added; or the whole file replaced."
    how = r.random()
    if how < .1: return special(path, r, here)
    if how < .25: text = r.choice(RAW); path.write_text(text); return f'raw {text[:20]!r}'
    if how < .3: data = r.choice(BYTES_); path.write_bytes(data); return f'bytes {data[:6]!r}'
    if how < .35: data = path.read_bytes(); path.write_bytes(data[:r.randrange(len(data)+1)]); return 'cut'
    value, said = json.loads(path.read_text()), []
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        at = r.choice([p for p in places(value) if p] or [()])
        if not at: continue
        new = r.choice(VALUES)
        what = r.choice(['put', 'put', 'put', 'drop', 'extra'])
        if what == 'extra' and extra and isinstance(value, dict): k, new = r.choice(extra); value[k] = new; said.append(f'{k}={new!r}'[:80])
        elif what == 'drop': drop(value, at); said.append(f'no {at}')
        else: put(value, at, new); said.append(f'{at}={new!r}'[:80])
    path.write_text(json.dumps(value))
    return '; '.join(said) or 'same'

EVIL = '''import os; open({marker!r}, 'w').write('ran')
from transformers import BertConfig, BertForSequenceClassification
class Evil(BertConfig): model_type = 'evil'
'''
CONFIG = [('auto_map', {'AutoConfig': 'evil.Evil', 'AutoModelForSequenceClassification': 'evil.Evil', 'AutoModel': 'evil.Evil', 'AutoTokenizer': ['evil.Evil', None]}),
          ('model_type', 'evil'), ('model_type', 'gpt2'), ('model_type', 'roberta'), ('num_labels', 5), ('num_labels', 10**9), ('quantization_config', {'load_in_4bit': True}),
          ('quantization_config', {'quant_method': 'gptq', 'bits': 4}), ('_name_or_path', '../outside'), ('attn_implementation', 'user/kernel'), ('_attn_implementation', 'flash_attention_2'),
          ('dtype', 'float8_e4m3fn'), ('torch_dtype', 'int8'), ('dtype', 'float99'), ('dtype', 'float16'), ('pad_token_id', 10**6), ('architectures', ['Evil']), ('architectures', ['os']),
          ('architectures', 'BertModel'), ('id2label', ['x', 'y']), ('id2label', {'0': 'x', '2': 'y'}), ('id2label', {'0': 'x'}), ('num_hidden_layers', 3), ('num_hidden_layers', 10**9),
          ('hidden_size', '16'), ('vocab_size', 10**12), ('max_position_embeddings', 10**11), ('text_config', {'model_type': 'bert', 'num_hidden_layers': 10**9}), ('problem_type', 'x'),
          ('is_decoder', True), ('hidden_act', 'evil'), ('tokenizer_class', 'Evil'), ('base_model_name', '/etc'), ('transformers_version', None), ('return_dict', False)]

def evil_code(folder, here): (folder/'evil.py').write_text(EVIL.format(marker=str(outside(here)/'RAN')))

def on_config(here, r):
    folder = here/r.choice('abbbbb')
    evil_code(folder, here)
    return mutate_json(folder/'config.json', r, here, CONFIG)

TOKENIZER = [('auto_map', {'AutoTokenizer': ['evil.Evil', 'evil.Evil']}), ('tokenizer_class', 'evil.Evil'), ('tokenizer_class', 'LlamaTokenizer'), ('vocab_file', '../outside/secret.json'),
             ('tokenizer_file', '../outside/secret.json'), ('model_max_length', 10**30), ('model_max_length', 'x'), ('pad_token', None), ('added_tokens_decoder', {'x': 3}),
             ('added_tokens_decoder', {'99999999999': {'content': 'x'}}), ('chat_template', '{{ 1/0 }}'), ('fast_tokenizer_files', [1]), ('init_inputs', ['/etc/passwd'])]

def on_tokenizer(here, r):
    folder = here/r.choice('abbbbb')
    evil_code(folder, here)
    name = r.choice(['tokenizer.json', 'tokenizer_config.json', 'tokenizer_config.json', 'special_tokens_map.json', 'vocab.txt', 'added_tokens.json', 'tokenizer.model'])
    path = folder/name
    if not path.exists(): path.write_text('{}')
    return f'{name}: ' + mutate_json(path, r, here, TOKENIZER)

def on_index(here, r):
    "The index of b's shards, which are put in place of b's weights."
    for o in (here/'b').glob('*.safetensors'): o.unlink()
    for o in (here/'b-shards').glob('model*'): shutil.copy(o, here/'b')
    path = here/'b'/'model.safetensors.index.json'
    if r.random() < .4: return mutate_json(path, r, here, [('metadata', 3), ('weight_map', [])])
    table = json.loads(path.read_text())
    names, files = list(table['weight_map']), sorted(set(table['weight_map'].values()))
    new = r.choice(['../outside/model.safetensors', str(outside(here)/'model.safetensors'), 'pytorch_model.bin', 'config.json', '', '.', 'x.safetensors', 3, None, *files, 'model.safetensors\0',
                    '../a/model.safetensors', './'+files[0]])
    name = r.choice(names)
    table['weight_map'][name] = new
    if r.random() < .2: table['weight_map'] = dict.fromkeys(names, new)
    if r.random() < .2: table['weight_map'][r.choice(['zzz', 'classifier.weight2'])] = files[0]
    path.write_text(json.dumps(table))
    return f'{name} -> {new!r}'

DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64]

def bump(t): return (t.to(torch.float32)+1).to(t.dtype) if not t.is_complex() else t+1

def on_names(here, r):
    "Tensors under other names, twice, of other types and shapes; both readers must agree."
    path = here/r.choice('abbbbb')/'model.safetensors'
    tensors = load_file(path)
    said = []
    for _ in range(r.choice([1, 1, 2, 3])):
        name = r.choice(list(tensors)); t = tensors[name]
        norm = r.choice([n for n in tensors if 'LayerNorm' in n] or [name])
        what = r.choice(['gamma', 'both', 'bare', 'bare and whole', 'module', 'compiled', 'dtype', 'all dtype', 'shape', 'gone', 'extra', 'double prefix', 'all bare', 'inner',
                         'nan', 'empty', 'pooler', 'transposed', 'scalar', 'odd', 'position_ids', 'old all'])
        old = norm.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')
        if what == 'gamma' and norm in tensors: tensors[old] = tensors.pop(norm)
        elif what == 'old all': tensors = {n.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): v for n, v in tensors.items()}
        elif what == 'both' and norm in tensors: tensors[old] = bump(tensors[norm])
        elif what == 'bare': tensors[name.removeprefix('bert.')] = tensors.pop(name)
        elif what == 'bare and whole': tensors[name.removeprefix('bert.')+r.choice(['', '', '.x'])] = t.clone()
        elif what == 'all bare': tensors = {n.removeprefix('bert.'): v for n, v in tensors.items()}
        elif what in ('module', 'compiled'): p = dict(module='module.', compiled='_orig_mod.')[what]; tensors = {p+n: v for n, v in tensors.items()}
        elif what == 'dtype': tensors[name] = t.to(r.choice(DTYPES))
        elif what == 'all dtype': d = r.choice(DTYPES); tensors = {n: v.to(d) for n, v in tensors.items()}
        elif what == 'shape': tensors[name] = torch.zeros(*t.shape, 1)
        elif what == 'transposed': tensors[name] = t.T.contiguous() if t.ndim == 2 else t[:-1].clone()
        elif what == 'scalar': tensors[name] = torch.ones(())
        elif what == 'gone': tensors.pop(name)
        elif what == 'extra': tensors[r.choice(['zzz', 'bert.zzz.weight', 'lm_head.weight', 'bert.bert.'+name, 'Bert.'+name, name.upper(), name+'.weight'])] = bump(t)
        elif what == 'double prefix': tensors['bert.'+name] = bump(t)
        elif what == 'inner': tensors['model.'+name] = bump(t)
        elif what == 'nan' and t.is_floating_point(): tensors[name] = torch.full_like(t, float('nan'))
        elif what == 'empty': tensors[name] = t[:0].clone()
        elif what == 'position_ids': tensors['bert.embeddings.position_ids'] = torch.arange(40)[None]
        elif what == 'pooler': tensors.pop('bert.pooler.dense.weight', None)
        elif what == 'odd': tensors[r.choice(['weight', '.', '', 'bert.', 'bert.encoder.layer.99.attention.self.query.weight', 'é\u202e', '__metadata', 'classifier..weight'])] = torch.ones(2)
        said.append(f'{what} {name}')
    save_file({n: v.contiguous() for n, v in tensors.items()}, path, dict(format='pt'))
    return '; '.join(said)

def on_header(here, r):
    "The table of a weight file, byte by byte and entry by entry."
    path = here/r.choice('abbbbb')/'model.safetensors'
    if r.random() < .1: return special(path, r, here)
    data = path.read_bytes()
    size = struct.unpack('<Q', data[:8])[0]
    table = json.loads(data[8:8+size])
    what = r.choice(['size', 'cut', 'bytes', 'dtype', 'shape', 'offsets', 'twice', 'json', 'raw', 'meta', 'huge', 'type'])
    name = r.choice([n for n in table if n != '__metadata__'])
    text = None
    if what == 'size': path.write_bytes(struct.pack('<Q', r.choice([0, 1, size-1, size+1, 2**40, 2**63, 2**64-1, 10**8]))+data[8:]); return what
    if what == 'cut': path.write_bytes(data[:r.choice([0, 3, 8, 20, 8+size, len(data)-1])]); return what
    if what == 'bytes': i = r.randrange(8+size); path.write_bytes(data[:i]+bytes([r.randrange(256)])+data[i+1:]); return f'byte {i}'
    if what == 'raw': path.write_bytes(r.choice([o.encode() for o in RAW]+BYTES_)); return what
    if what == 'dtype': table[name]['dtype'] = r.choice(['F8_E4M3', 'C64', 'F4', 'X', 3, None, 'I32', 'f32'])
    elif what == 'shape': table[name]['shape'] = r.choice([[10**18], [-1], [2**63, 2], 'x', None, [], [1.5], [0]])
    elif what == 'offsets': table[name]['data_offsets'] = r.choice([[0, 10**12], [-4, 0], [8, 4], [0], 'x', None, [0, 4]])
    elif what == 'type': table[name] = r.choice([None, 3, 'x', [], {}])
    elif what == 'meta': table['__metadata__'] = r.choice([3, {'format': 'tf'}, {'format': 3}, {}, [], {'x': 'y'*10**6}])
    elif what == 'twice': text = json.dumps(table)[:-1]+f', {json.dumps(name)}: {json.dumps(table[r.choice(list(table))])}}}'
    elif what == 'json': text = r.choice(RAW)
    elif what == 'huge': table |= {f'x{i}': dict(dtype='F32', shape=[0], data_offsets=[0, 0]) for i in range(20000)}
    head = (text or json.dumps(table)).encode()
    path.write_bytes(struct.pack('<Q', len(head))+head+data[8+size:])
    return f'{what} {name}'

LAUGHS = 'a: &a [x,x,x,x,x,x,x,x,x]\n' + ''.join(f'{b}: &{b} [{",".join(["*"+a]*9)}]\n' for a, b in zip('abcdefgh', 'bcdefghi'))
YAML = ['', '[]', 'null', '- a', ': :', '[', '{', '\t', '&a [*a]', LAUGHS, '['*3000, 'license: !!python/object/apply:os.system ["touch RAN"]', 'license: '+'9'*5000,
        'license: {a: {b: c}}', 'license: [mit, 3, {a: b}]', 'language: 3\ndatasets: {a: b}', 'license: "x\\n---\\n# y"', 'license: "|a|<b>`c`[d](e)"', 'license: 2020-99-99',
        '<<: 3', '? [a]\n: b', 'a: 1\na: 2', '!!binary "////"', 'license: !!float x', 'license_link: javascript:alert(1)\nlicense: other', 'x: !!set {a, b}', '\x1b[31m', '*a', '%YAML 9.9\n---\na',
        'a: !!timestamp x', '1: 2', '"\\ud800": x', '0x'+'f'*9000+': 1', 'a: 1:'+'1:'*3000+'1']

def on_card(here, r):
    folder = here/r.choice('abbbbb')
    path = folder/r.choice(['README.md', 'README.md', 'modules.json', '1_Pooling/config.json', 'config_sentence_transformers.json'])
    if path.suffix == '.json':
        if not path.exists(): path.write_text('{}')
        if path.name == 'modules.json' and r.random() < .5:
            where, kind = r.choice(['../../outside', '/etc', '1_Pooling/../..', '1_x', 'x', '', 3, None, '1_Pooling']), r.choice(['Pooling', 'Dense', 'os.system', '../x', 3])
            path.write_text(json.dumps([MODULES[0], dict(path=where, type=f'sentence_transformers.models.{kind}')]))
            return f'modules {where!r} {kind!r}'
        return f'{path.name}: ' + mutate_json(path, r, here)
    if r.random() < .15: return special(path, r, here)
    text = r.choice(YAML)
    path.write_bytes(f'---\n{text}\n---\n# x\n'.encode('utf-8', 'surrogatepass'))
    return f'card {text[:40]!r}'

def on_fisher(here, r):
    "A file of Fishers: its numbers, its table, and what it says of them."
    path = here/r.choice(['a.fisher.safetensors', 'b.fisher.safetensors'])
    if r.random() < .1: return special(path, r, here, SPECIAL[:-2])
    with safe_open(path, 'pt') as f: tensors, about = {n: f.get_tensor(n) for n in f.keys()}, f.metadata()
    what = r.choice(['meta', 'meta', 'meta value', 'numbers', 'name', 'value', 'dtype', 'shape', 'bytes'])
    if what == 'bytes': path.write_bytes(r.choice([*BYTES_, *(o.encode() for o in RAW)])); return what
    if what == 'meta': about[r.choice(['meta', 'num_examples', 'x'])] = r.choice([*RAW[:13], '-1', '9'*5000, '1.5', '\x1b[31m', 'x'*10**5])
    if what == 'meta value': meta = json.loads(about['meta']); meta[r.choice(list(meta))] = r.choice(VALUES); about['meta'] = json.dumps(meta)
    name = r.choice(list(tensors)); t = tensors[name]
    if what == 'value': t.view(-1)[0] = r.choice([-1., float('nan'), float('inf'), 1e38])
    if what == 'name': tensors[r.choice(['x', 'heads', 'rows', '../x', 'heads.99', ''])] = tensors.pop(name)
    if what == 'dtype': tensors[name] = t.to(r.choice(DTYPES[:7]))
    if what == 'shape': tensors[name] = t.reshape(-1)[:-1].clone()
    save_file(tensors, path, about)
    return f'{what} {name}'

def on_report(here, r):
    path = here/'merged'/'merge_report.json'
    report = json.loads(path.read_text())
    if r.random() < .4:
        name = r.choice(['../../outside/planted.json', str(outside(here)/'planted.json'), 'a/config.json', 'model.safetensors', 'README.md', '1_x/config.json', '1_Pooling/config.json',
                         'x.json', '', '.', '1_P/../../x/config.json', 'modules.json\n', 'recipe.yml', '1_Pooling/config.json/x'])
        report['sentence_transformers'] = dict(files={'modules.json': [], name: r.choice([{}, 'x', DEEP])})
        path.write_text(json.dumps(report)); return f'files {name!r}'
    if r.random() < .3:
        name = r.choice(['..', '.', '../a', '/etc', str(outside(here)), 'a/..', '', 'x\0', 'c', 'model.safetensors', 'a '])
        report['tasks'][name] = report['tasks'].pop('a')
        path.write_text(json.dumps(report)); return f'task {name!r}'
    return mutate_json(path, r, here, [('tasks', ['a', 'b']), ('tasks', 'ab'), ('scores', {'a': 3}), ('scores', {'a': {'f1': 'x'}}), ('sentence_transformers', 3), ('roles', {'x': 3}),
                                       ('zero_fisher', {'heads': 1}), ('base_source', {'card': {'license': {'a': 1}}}), ('versions', []), ('method', {'a': 1}), ('base', 'x')])

def on_merged(here, r):
    "Something else of a merged folder: a task's config, its files, its recipe."
    name = r.choice(['a/config.json', 'a/model.safetensors.index.json', 'recipe.yml', 'config.json', 'tokenizer.json', 'folder'])
    path = here/'merged'/name
    if name == 'recipe.yml': return 'recipe: '+mutate_recipe(path, r, here)
    if name == 'folder':
        shutil.rmtree(here/'merged'/'a')
        (here/'merged'/'a').symlink_to(r.choice([here/'a', outside(here), '/etc', here/'merged'/'b']))
        return 'task folder is a link'
    evil_code(here/'merged'/'a', here)
    return f'{name}: '+mutate_json(path, r, here, CONFIG)

RECIPES = ['models: {a: ./a, b: ./b}\nmethod: average\n', 'models:\n  a: {model: ./a}\n  b: ./b\nmethod: ties\nbase: ./a\noptions: {density: .5}\n',
           'models: {a: ./a, b: ./b}\nmethod: mask-fisher\nfishers: {a: ./a.fisher.safetensors, b: ./b.fisher.safetensors}\n',
           'models: {a: ./a, b: ./b}\nmethod: mask-fisher\ndata: {a: ./rows.csv, b: ./rows.csv}\nnum_samples: 4\n']

def mutate_recipe(path, r, here):
    import yaml
    if r.random() < .1: return special(path, r, here, SPECIAL if path.name == 'recipe.yml' else SPECIAL[:-2]) # who names a recipe may name a link
    if r.random() < .3: text = r.choice(YAML+[f'{RECIPES[0]}x: {o}' for o in ('1', '&a [*a]')]+['models: '+o for o in ('3', '[a]', '{a: 3}', '{../x: ./a}', '"'+'x'*10**5+'"', '{a: ~nobody/x}')]); path.write_bytes(text.encode('utf-8', 'surrogatepass')); return f'{text[:30]!r}'
    value = yaml.safe_load(r.choice(RECIPES))
    for _ in range(r.choice([1, 1, 2])):
        at, new = r.choice([p for p in places(value) if p]), r.choice([*VALUES, 10**40, ['a'], '~nobody/x', './a\0', 'x'*300+'/y', './rows.csv', './merged', 'glue:nope', b'x', (1, 2), '.', '..'])
        try: drop(value, at) if r.random() < .2 else put(value, at, new)
        except (KeyError, TypeError, IndexError): pass
    path.write_text(yaml.dump(value))
    return yaml.dump(value)[:100]

def on_recipe(here, r): return mutate_recipe(here/'r.yml', r, here)

def on_folder(here, r):
    "A folder that holds something else."
    folder = here/'b'
    weights = folder/'model.safetensors'
    what = r.choice(['adapter', 'both', 'bin', 'onnx', 'gguf', 'tf', 'flax', 'empty', 'checkpoint', 'file', 'renamed', 'lfs', 'lfs tokenizer', 'pickle', 'link out', 'link in', 'pipe', 'no config',
                     'sharded bin', 'code', 'null', 'long', 'locked', 'extra pipe', 'index only', 'pickled tokenizer', 'bare folder'])
    if what in ('adapter', 'both'):
        (folder/'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', base_model_name_or_path=str(outside(here)))))
        save_file(dict(x=torch.ones(2)), folder/'adapter_model.safetensors')
    names = dict(bin='pytorch_model.bin', onnx='model.onnx', gguf='model.gguf', tf='tf_model.h5', flax='flax_model.msgpack', renamed='consolidated.safetensors')
    if what in names: weights.rename(folder/names[what])
    if what == 'adapter': weights.unlink(); (folder/'config.json').unlink()
    if what == 'empty': shutil.rmtree(folder); folder.mkdir()
    if what == 'bare folder':
        for o in folder.iterdir():
            if o.is_file() and o.name != 'README.md': o.unlink()
    if what == 'checkpoint': (here/'tmp').mkdir(); folder.rename(here/'tmp'/'checkpoint-500'); (here/'tmp').rename(folder)
    if what == 'file': data = weights.read_bytes(); shutil.rmtree(folder); folder.write_bytes(data)
    if what == 'lfs': weights.write_text(RAW[16])
    if what == 'lfs tokenizer': (folder/'tokenizer.json').write_text(RAW[16])
    if what in ('pickle', 'sharded bin', 'pickled tokenizer'):
        import pickle
        class Bad:
            def __reduce__(self): return (open, (str(outside(here)/'RAN'), 'w'))
        if what == 'pickled tokenizer': (folder/'tokenizer.json').unlink(); (folder/'tokenizer_config.json').write_text('{"tokenizer_class": "TransfoXLTokenizer"}'); (folder/'vocab.pkl').write_bytes(pickle.dumps(Bad())); (folder/'vocab.bin').write_bytes(pickle.dumps(Bad()))
        else:
            weights.unlink(); (folder/'pytorch_model.bin').write_bytes(pickle.dumps(Bad()))
            if what == 'sharded bin': (folder/'pytorch_model.bin.index.json').write_text(json.dumps(dict(metadata={}, weight_map={'x': 'pytorch_model.bin'})))
    if what == 'link out': weights.unlink(); weights.symlink_to(outside(here)/'model.safetensors')
    if what == 'link in': weights.rename(folder/'real.safetensors'); weights.symlink_to('real.safetensors')
    if what == 'pipe': weights.unlink(); os.mkfifo(weights)
    if what == 'extra pipe': os.mkfifo(folder/r.choice(['generation_config.json', 'special_tokens_map.json', 'added_tokens.json', 'chat_template.jinja', 'vocab.txt', 'preprocessor_config.json']))
    if what == 'no config': (folder/'config.json').unlink()
    if what == 'index only': weights.unlink(); (folder/'model.safetensors.index.json').write_text('{"metadata": {}, "weight_map": {"x": "model.safetensors"}}')
    if what == 'code':
        evil_code(folder, here)
        config = json.loads((folder/'config.json').read_text())
        (folder/'config.json').write_text(json.dumps(config | dict(CONFIG[0:1]) | dict(model_type=r.choice(['bert', 'evil', 'gpt2', 'timm_wrapper']))))
    if what == 'locked': weights.chmod(0)
    return what

WORDS = ['--out', '--data', '--weights', '--fisher', '--method', '--options', '--seed', '--num-samples', '--max-length', '--precision', '--device', '--base', '--max-shard-size', '--scheme',
         '--variant', '--labels', '--json', '--overwrite', '--import', '--split', '--accept-changes', '--nope', '-x', '--', 'a=a', 'b=b', 'a=rows.csv', 'b=rows.csv', 'a=a.fisher.safetensors',
         'b=b.fisher.safetensors', 'x', '=', 'a=', '=a', 'a=b=c', '', '9'*5000, '-1', '1e999', 'nan', 'a=nan', 'b=1', 'ties', 'average', 'mask-fisher', 'soup', 'glue:sst2', 'rows.csv', 'rows.jsonl',
         'merged', 'r.yml', 'cpu', 'meta', 'cuda:99', 'bf16', 'density=.5', 'density='+'['*3000, 'density='+'9'*5000, 'scale=x', '5GB', '1KB', '0', 'a\x1b[31m', '../outside', 'é', '~nobody/x',
         'x'*5000, 'density=null', 'scheme=3', 'variant=x', 'seed=3', '²']
LINES = ['merge a=a b=b --method average --out new', 'merge a=a b=b --data a=rows.csv b=rows.csv --num-samples 2 --out new', 'merge r.yml --out new', 'fisher a --data rows.csv --num-samples 2 --out new.safetensors',
         'evaluate a --data rows.csv', 'evaluate merged --data a=rows.csv b=rows.csv', 'merge a=a b=b --fisher a=a.fisher.safetensors b=b.fisher.safetensors --weights a=1 b=.5 --out new',
         'compare a=a b=b --data a=rows.csv b=rows.csv --methods average --share .5 --num-samples 2 --out new --save best', 'predict merged w1 w2', 'evaluate merged --data a=rows.csv b=rows.csv --update-card',
         'merge a=a b=b --method ties --base a --out new', 'report a --out new', 'bench a --data rows.csv --rounds 1 --num-samples 2 --out new']

def on_words(here, r):
    line = r.choice(LINES).split(' ')
    (here/'r.yml').write_text(RECIPES[0])
    for _ in range(r.choice([1, 1, 2, 3])):
        i = r.randrange(1, len(line))
        what = r.choice(['put', 'put', 'drop', 'add', 'twice'])
        if what == 'put': line[i] = r.choice(WORDS)
        elif what == 'drop': del line[i]
        elif what == 'add': line[i:i] = [r.choice(WORDS), r.choice(WORDS)][:r.choice([1, 2])]
        else: line.append(line[i])
        if len(line) < 2: break
    line = [{'--num-samples=0': o}.get(o, o) for o in line]
    (here/'line.json').write_text(json.dumps(line))
    return ' '.join(o[:60] for o in line)

def on_data(here, r):
    path = here/'rows.csv'
    what = r.choice(['special', 'raw', 'bytes', 'cells', 'rows', 'head'])
    if what == 'special': return special(path, r, here)
    if what == 'raw': path.write_text(r.choice(RAW))
    elif what == 'bytes': path.write_bytes(r.choice(BYTES_))
    elif what == 'head': path.write_text(path.read_text().replace('sentence,label', r.choice(['label,label', 'sentence', 'x,y', ',', 'sentence,label,label', 'idx,label'])))
    else:
        rows = path.read_text().split('\n')
        for _ in range(r.choice([1, 2])): rows[r.randrange(1, 12)] = r.choice(['', ',', 'x', 'x,99', 'x,-1', 'x,1.5', 'x,y', ',1', '"', 'x,1,2', 'x,'+'9'*30, '\0,1', 'w1 '*5000+',1', '=cmd(),1'])
        path.write_text('\n'.join(rows))
    return what

class Bad:
    "Runs something when it is unpickled."
    def __init__(self, call, *args): self.call, self.args = call, args
    def __reduce__(self): return self.call, self.args

def on_pickle(here, r):
    "A pickle that is damaged, or holds what is no plain tensor, or more than it seems; and what stands beside it."
    folder, path = here/'p', here/'p'/'pytorch_model.bin'
    if r.random() < .15: return special(path, r, here)
    what = r.choice(['bytes', 'cut', 'flip', 'call', 'call', 'object', 'object', 'names', 'expanded', 'zipped', 'old', 'both', 'config', 'shell'])
    state, data, n = torch.load(path, weights_only=True), path.read_bytes(), 'bert.pooler.dense.weight'
    if what == 'bytes': path.write_bytes(r.choice([o.encode() for o in RAW]+BYTES_))
    elif what == 'cut': path.write_bytes(data[:r.randrange(len(data))])
    elif what == 'flip': i = r.randrange(2000); path.write_bytes(data[:i]+bytes([r.randrange(256)])+data[i+1:])
    elif what == 'call':
        bad = r.choice([Bad(open, str(outside(here)/'RAN'), 'w'), Bad(eval, f'open({str(outside(here)/"RAN")!r}, "w")'), Bad(os.system, f'touch {outside(here)}/RAN'), Bad(getattr, torch, 'load'), Bad(list, range(10**9)),
                        Bad(bytearray, 10**12), Bad(torch.hub.load, 'x/y', 'z')])
        o = r.choice([bad, {n: bad}, state | {n: bad}, [bad], {'x': {'y': bad}}])
        path.write_bytes(pickle.dumps(o)) if r.random() < .5 else torch.save(o, path)
    elif what == 'object':
        o = r.choice([None, [], {}, 3, 'x', {1: torch.ones(2)}, {n: 3}, {n: None}, {n: [torch.ones(2)]}, {n: torch.ones(2).to_sparse()}, {n: torch.ones(2, dtype=torch.complex64)}, {n: torch.ones((), device='meta')},
                      {n: torch.quantize_per_tensor(torch.ones(2), .1, 0, torch.qint8)}, {n: torch.nn.Linear(2, 2)}, {'state_dict': state}, {n: torch.ones(2, requires_grad=True)}, state | {'x\x1b\n': torch.ones(2)},
                      state | {'x'*10**5: torch.ones(2)}, state | {'__metadata__': torch.ones(2)}, state | {n: torch.full((16, 16), float('nan'))}])
        torch.save(o, path)
    elif what == 'names': torch.save({r.choice(['module.', '_orig_mod.', '', 'x/', '../'])+k: v for k, v in state.items()}, path)
    elif what == 'expanded': torch.save(state | {n: torch.zeros(1).expand(r.choice([10**6, 10**9, 10**12, 2**40]))}, path)
    elif what == 'zipped':
        with zipfile.ZipFile(path) as z: parts = {o: z.read(o) for o in z.namelist()}
        big = max(parts, key=lambda o: len(parts[o]))
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
            for o, b in parts.items(): z.writestr(o, b+b'\0'*(10**8 if o == big else 0))
    elif what == 'old': torch.save(state, path, _use_new_zipfile_serialization=False); path.write_bytes(path.read_bytes()[:r.choice([-1, -1000, 10**9])])
    elif what == 'both': shutil.copy(here/'a'/'model.safetensors', folder)
    elif what == 'config': return mutate_json(folder/'config.json', r, here, CONFIG)
    elif what == 'shell': return special(folder/r.choice(['tokenizer.json', 'README.md', 'generation_config.json', 'vocab.txt']), r, here)
    return what

def on_parts(here, r):
    "The index of a pickle in parts, or one of these."
    path = here/'q'/'pytorch_model.bin.index.json'
    parts = sorted(o.name for o in (here/'q').glob('*.bin'))
    if r.random() < .3: return special(here/'q'/parts[0], r, here)
    if r.random() < .4: return mutate_json(path, r, here, [('weight_map', []), ('weight_map', {})])
    table = json.loads(path.read_text())
    name, new = r.choice(list(table['weight_map'])), r.choice(['../outside/pytorch_model-00001-of-00002.bin', '/etc/passwd', '', 3, None, [], parts[0], parts[1], 'pytorch_model-00003-of-00002.bin', 'pytorch_model.bin', 'x'*10**4])
    table['weight_map'][name] = new
    if r.random() < .2: table['weight_map'][r.choice(['zzz', 'x\x1b'])] = parts[0]
    path.write_text(json.dumps(table))
    return f'{name} -> {str(new)[:40]!r}'

LISTED = ['../outside/secret.json', '/etc/passwd', '..', '.', '', 'a/../../outside/secret.json', './config.json', 'config.json', 'pipe', 'link', 'mine.txt', 'sub/mine.txt', '../in/rows.csv', 'x\0', 'x'*5000, '//', 'sub/']

def planted(here, r, folder, record):
    "A folder of ours in which somebody says that other files are of it too; those stay."
    for o in ('mine.txt', 'sub/mine.txt'): (folder/o).parent.mkdir(exist_ok=True); (folder/o).write_text('mine')
    os.mkfifo(folder/'pipe'); (folder/'link').symlink_to(outside(here)/'secret.json')
    if r.random() < .4: return mutate_json(folder/record, r, here, [('files', []), ('files', {'x': 3})])
    name = r.choice(LISTED)
    said = json.loads((folder/record).read_text())
    said['files'][name] = r.choice([{}, dict(size=4, hash='0'*16), dict(signed=True), dict(tokenizer=True), dict(size='x')])
    (folder/record).write_text(json.dumps(said))
    return f'lists {name[:40]!r}'

def on_old(here, r): return planted(here, r, here/'old', 'convert.json')

def on_page(here, r): return planted(here, r, here/'old-page', 'report.json')

# a base elsewhere is no harm: an adapter may name any, as SECURITY.md says
ADAPTER = [('base_model_name_or_path', o) for o in ('/etc', '', 'a\0', 'la', 'nobody/nothing', '~', 'x'*5000, 3, 'p')] + [('peft_type', o) for o in ('IA3', 'EVIL', None, 3)] + [
    ('r', 10**9), ('r', 0), ('r', -1), ('r', '2'), ('lora_alpha', float('nan')), ('lora_alpha', 10**400), ('lora_alpha', -1), ('target_modules', '(a+)+$'), ('rank_pattern', {'(a+)+$': 2}), ('rank_pattern', {'query': 10**9}),
    ('alpha_pattern', {'query': float('inf')}), ('auto_mapping', {'base_model_class': 'Evil', 'parent_library': 'evil'}), ('modules_to_save', ['..']), ('init_lora_weights', 'evil'), ('use_dora', True), ('bias', 'all'),
    ('task_type', 'EVIL'), ('task_type', 'CAUSAL_LM'), ('revision', '../x'), ('fan_in_fan_out', True), ('layer_replication', [[0, 10**6]]), ('corda_config', {'a': 1}), ('megatron_config', {'a': 1}), ('trainable_token_indices', [10**9])]

def on_adapter(here, r):
    "The configuration of an adapter, its table, its numbers, or what lies beside it."
    folder = here/r.choice(['la', 'lb'])
    path = folder/'adapter_model.safetensors'
    what = r.choice(['config', 'config', 'extra', 'extra', 'table', 'tensors', 'tensors', 'special', 'pickle', 'code'])
    if what == 'config': return mutate_json(folder/'adapter_config.json', r, here, ADAPTER)
    if what == 'extra':
        k, v = r.choice(ADAPTER)
        said = json.loads((folder/'adapter_config.json').read_text())
        (folder/'adapter_config.json').write_text(json.dumps(said | {k: v}))
        return f'{k} {str(v)[:40]!r}'
    if what == 'special': return special(r.choice([path, folder/'adapter_config.json', folder/'tokenizer.json', folder/'tokenizer_config.json', folder/'config.json']), r, here)
    if what == 'pickle': path.unlink(); (folder/'adapter_model.bin').write_bytes(pickle.dumps(Bad(open, str(outside(here)/'RAN'), 'w'))); return what
    if what == 'code': evil_code(folder, here); (folder/'config.json').write_text(json.dumps(dict(CONFIG[:2]))); return what
    if what == 'table': data = path.read_bytes(); i = r.randrange(400); path.write_bytes(data[:i]+bytes([r.randrange(256)])+data[i+1:]); return f'byte {i}'
    tensors = load_file(path)
    n = r.choice(list(tensors)); t = tensors.pop(n)
    tensors |= r.choice([{}, {n: t[:-1].clone()}, {n: t.mT.contiguous() if t.ndim > 1 else t[None]}, {n: torch.full_like(t, float('nan'))}, {n: t.to(torch.float16)}, {n: t.to(torch.int8)}, {n.replace('base_model.model.', ''): t}, {n.replace('query', 'evil'): t},
                         {n: t, n.replace('lora_A', 'lora_C'): t.clone()}, {n: t, 'base_model.model.classifier.weight': torch.ones(2, 99)}, {n: t, 'x\x1b': t.clone()}, {n.replace('layer.0', 'layer.99'): t}, {n: torch.zeros(0)}, {n: torch.zeros(10**6)}])
    save_file(tensors, path)
    return f'tensors {n}'

NAMES = ['x; touch RAN', '$(touch RAN)', '`touch RAN`', "a'b", '<script>alert(1)</script>', '\n# Evil\n', '[a](javascript:x)', '\x1b[31mred', 'x'*10**5, '../up', 'a|b', 'change-x', '', '\u202e', 'average', 'mask-fisher', '-x', '--out']

def on_result(here, r):
    "Files of results that somebody else gives: other values, other names, a great many groups, no files."
    folder = here/'results'
    path = folder/r.choice(['own.json', 'own.json', 'average-k2.json', 'mask-fisher-k2-n2-s0.json', 'fisher_error.json'])
    what = r.random()
    if what < .5: return f'{path.name}: '+mutate_json(path, r, here, [('schema', 9), ('schema', 'x'*9999), ('versions', []), ('versions', {'a': {'b': 1}}), ('limit', 3), ('commit', NAMES[5]), ('date', NAMES[4])])
    if what < .6:
        tasks = [f't{i}' for i in range(r.choice([30, 60, 200]))]
        own = json.loads((folder/'own.json').read_text())
        one = next(iter(own['models'].values()))
        (folder/'own.json').write_text(json.dumps(own | dict(models={t: one for t in tasks})))
        for o in ('average-k2.json', 'mask-fisher-k2-n2-s0.json'):
            cell = json.loads((folder/o).read_text())
            (folder/o).write_text(json.dumps(cell | dict(models={t: one['weight_hash'] for t in tasks}, group_size=len(tasks)//2, groups={})))
        return f'{len(tasks)} tasks'
    if what < .7: new = folder/r.choice(['x.json', 'own2.json', 'a\nb.json', '\x1b.json', 'x'*200+'.json']); new.write_text(r.choice(['{}', '[]', DEEP, path.read_text()])); return f'file {new.name[:20]!r}'
    name = r.choice(NAMES)
    if what < .8: o = json.loads((folder/'own.json').read_text()); (folder/'own.json').write_text(json.dumps(o | dict(checkpoints=name))); return f'checkpoints {name[:20]!r}'
    if what < .9: o = json.loads((folder/'average-k2.json').read_text()); (folder/'average-k2.json').write_text(json.dumps(o | dict(name=name))); return f'name {name[:20]!r}'
    for o in folder.glob('*.json'): o.write_text(json.dumps(json.loads(o.read_text().replace('rte', '@TASK@').replace('"@TASK@"', json.dumps(name)).replace('@TASK@', json.dumps(name)[1:-1]))))
    return f'task {name[:20]!r}'

def on_run(here, r):
    "What lies in the folder of a run that goes on: results, measurements, and hidden files."
    out = here/'done'
    what = r.choice(['own', 'own', 'cell', 'cell', 'cache', 'cache', 'hidden', 'hidden', 'new'])
    fishers = sorted((out/'cache').glob('*.safetensors'))
    if what in ('own', 'cell'): return f'{what}: '+mutate_json(out/dict(own='own.json', cell='average-k2.json')[what], r, here, [('schema', 9), ('models', []), ('groups', {'sst2+rte': 3})])
    if what == 'new': return special(out/r.choice(['mask-fisher-k2-n2-s0.json', 'fisher_error.json', 'x-k2.json']), r, here)
    if what == 'cache':
        path = r.choice(fishers)
        if r.random() < .4: return special(path, r, here)
        data = path.read_bytes(); path.write_bytes(r.choice([b'', data[:-3], *BYTES_, *(o.encode() for o in RAW)])); return what
    path = r.choice([out/'own.json', out/'average-k2.json', out/'mask-fisher-k2-n2-s0.json', *fishers])
    hidden = path.with_name(f'.{path.name}.{r.choice(["lock", "lock", "part", "7.part"])}')
    if r.random() < .6: return f'{hidden.name}: '+special(hidden, r, here)
    hidden.write_text(r.choice([*RAW, '{"done": [1, 2]}', '{"done": '+DEEP+'}', '{"moving": ["../../outside"], "done": "x"}', '{"pid": "'+'x'*10**5+'"}']))
    return f'{hidden.name} of text'

def on_steps(here, r):
    "A file of timings."
    path = here/'bench'/'cost.json'
    if r.random() < .2: path = here/'bench'/r.choice(['x.json', 'x\n.json']); path.write_text(r.choice([*RAW, json.dumps(dict(steps=[{}]))])); return path.name
    return mutate_json(path, r, here, [('steps', {}), ('steps', []), ('steps', [3]), ('batch', 'x'), ('batch_tokens', 'x'), ('batch_tokens', 10**30), ('num_examples', 0), ('seconds', 1e308), ('ms', 'x'), ('file', '../x'), ('schema', 2)])

def on_out(here, r):
    "What lies at the place of a file to write, and hidden beside it."
    out = here/'o.json'
    hidden = here/f'.o.json.{r.choice(["lock", "lock", "part", "7.part"])}'
    if r.random() < .3: return 'out: '+special(out, r, here)
    if r.random() < .3: out.write_text('{"steps": 3}')
    if r.random() < .5: return f'{hidden.name}: '+special(hidden, r, here)
    hidden.write_text(r.choice([*RAW, '{"done": [1, 2]}', '{"done": true}', '{"pid": "\x1b"}']))
    return f'{hidden.name} of text'

KINDS = dict(pickle=on_pickle, parts=on_parts, old=on_old, page=on_page, adapter=on_adapter, result=on_result, run=on_run, steps=on_steps, out=on_out, config=on_config, tokenizer=on_tokenizer, index=on_index, names=on_names, header=on_header, card=on_card, report=on_report, fisher=on_fisher, merged=on_merged, recipe=on_recipe,
             folder=on_folder, words=on_words, data=on_data)


# --- the doors ------------------------------------------------------------------------------

def pair(here): return {t: here/t for t in 'ab'}

def same(x, y):
    "Whether two saved merges hold the same numbers."
    def tensors(p): return {str(f.relative_to(p)): {n: t for n, t in load_file(f).items()} for f in sorted(p.rglob('*.safetensors'))}
    a, b = tensors(x), tensors(y)
    return a.keys() == b.keys() and all(a[f].keys() == b[f].keys() and all(a[f][n].dtype == b[f][n].dtype and torch.equal(a[f][n], b[f][n]) for n in a[f]) for f in a)

class Disagree(Exception): pass

def both_ways(here):
    "`merge` and `merge_files`: both refuse, or both give the same bits."
    def tried(f):
        try: f(); return None
        except Exception as e: return e
    one = tried(lambda: merge(pair(here), method='average').save_pretrained(here/'one'))
    two = tried(lambda: merge_files(pair(here), method='average', out=here/'two', progress=False))
    if (one is None) != (two is None): raise Disagree(f'merge: {one}; merge_files: {two}')
    if one is not None:
        if type(one) is not type(two): raise Disagree(f'merge: {one!r}; merge_files: {two!r}')
        raise one
    if not same(here/'one', here/'two'): raise Disagree('other numbers')

def load_and_save(here):
    found = Merged.from_pretrained(here/'merged')
    found.save_pretrained(here/'again')
    found.save_pretrained(here/'again', overwrite=True)

def shell(here): return main(json.loads((here/'line.json').read_text()) if (here/'line.json').exists() else LINES[0].split())

def check_page(here):
    "What a stranger's results become: text that means nothing to Markdown or a terminal, and pictures in the folder."
    text = (here/'new'/'report.md').read_text()
    assert text.replace('\n', '').isprintable() and '<script>' not in text and '\n# Evil' not in text and '[a](' not in text, text[:500]
    assert {*re.findall(r'\]\((.+?\.png)\)', text)} == {o.name for o in (here/'new').glob('*.png')}
    sys.stdout.flush()
    said = (here.parent/'log').read_text(errors='replace')
    assert said.replace('\n', '').isprintable(), said[-500:]

def show(here):
    status = main(['report', 'results', '--out', 'new'])
    if not status: check_page(here)
    return status

def tables(here):
    "All that a page reads of a folder of results; its commands are words for a shell and nothing else."
    found = load_results(here/'results', partial=True)
    provenance(here/'results'), load_errors(here/'results')
    for line in commands(here/'results', results=found): assert ' '.join(map(shlex.quote, shlex.split(line))) == line, line[:500]

def again(here, folder, *line):
    "Write once more into a folder in which other files lie; they stay."
    mine = ('mine.txt', 'sub/mine.txt', 'pipe', 'link')
    status = main([*line, '--out', folder, '--overwrite'])
    assert all(os.path.lexists(here/folder/o) for o in mine)
    return status

def adapters(here): merge({t: here/f'l{t}' for t in 'ab'}, method='average', merge_adapters=True).save_pretrained(here/'new')

MODEL = ['config', 'tokenizer', 'index', 'names', 'header', 'card', 'folder']
DOORS = dict( # what is called -> the kinds of input that reach it
    merge=(lambda h: merge(pair(h), method='average').save_pretrained(h/'new'), MODEL),
    merge_files=(lambda h: merge_files(pair(h), method='average', out=h/'new', progress=False), MODEL),
    fishers=(lambda h: merge(pair(h), {t: h/f'{t}.fisher.safetensors' for t in 'ab'}).save_pretrained(h/'new'), ['fisher']),
    fishers_of_files=(lambda h: merge_files(pair(h), {t: h/f'{t}.fisher.safetensors' for t in 'ab'}, out=h/'new', progress=False), ['fisher']),
    both_ways=(both_ways, ['names', 'index', 'header', 'config']),
    mask_fisher=(lambda h: mask_fisher(h/'b', Dataset.from_list([dict(sentence='w1 w2', label=1)]*3), progress=False), ['config', 'tokenizer', 'index', 'names', 'header', 'folder']),
    evaluate=(lambda h: evaluate(h/'b', Dataset.from_list(examples(4, 2))), ['config', 'tokenizer', 'index', 'names', 'header', 'folder']),
    from_pretrained=(load_and_save, ['report', 'report', 'merged']),
    run_recipe=(lambda h: run_recipe(h/'r.yml', h/'new', progress=False), ['recipe']),
    shell=(shell, ['words', 'words', 'config', 'folder', 'header', 'tokenizer']),
    shell_recipe=(lambda h: main(['merge', str(h/'r.yml'), '--out', str(h/'new')]), ['recipe']),
    shell_predict=(lambda h: main(['predict', str(h/'merged'), 'w1 w2']), ['report', 'merged']),
    shell_merged=(lambda h: main(['evaluate', str(h/'merged'), '--data', 'a=rows.csv', 'b=rows.csv']), ['report', 'merged']))
COMMANDS = dict( # the same, of commands that write
    shell_convert=(lambda h: main(['convert', 'p', '--out', 'new']), ['pickle']),
    shell_convert_parts=(lambda h: main(['convert', 'q', '--out', 'new']), ['parts']),
    shell_convert_again=(lambda h: again(h, 'old', 'convert', 'p'), ['old']),
    adapters=(adapters, ['adapter', 'adapter', 'adapter', 'config']),
    shell_adapters=(lambda h: main('merge a=la b=lb --method average --merge-adapters --out new'.split()), ['adapter']),
    shell_report=(show, ['result']),
    shell_report_again=(lambda h: again(h, 'old-page', 'report', 'plain'), ['page']),
    tables=(tables, ['result']),
    shell_reproduce=(go_on, ['run']),
    load_bench=(lambda h: load_bench(h/'bench'), ['steps']),
    shell_out=(lambda h: main(['evaluate', 'a', '--data', 'rows.csv', '--out', 'o.json']), ['out']))
DOORS |= COMMANDS
MORE = dict(dict.fromkeys(['shell_convert', 'shell_convert_parts', 'shell_convert_again'], make_pickles), adapters=make_adapters, shell_adapters=make_adapters, shell_reproduce=make_run,
            **dict.fromkeys(['shell_report', 'shell_report_again', 'tables', 'load_bench'], make_results)) # what a door needs in the sandbox
DATA_DOORS = dict(shell_fisher=(lambda h: main(['fisher', 'a', '--data', 'rows.csv', '--num-samples', '4', '--out', 'new.safetensors']), ['data']),
                  shell_compare=(lambda h: main('compare a=a b=b --data a=rows.csv b=rows.csv --methods average,regmean --share .5 --num-samples 4 --out new'.split()), ['data']),
                  shell_asked=(lambda h: main(['predict', 'a', '--data', 'rows.csv']), ['data']),
                  shell_evaluate=(lambda h: main(['evaluate', 'a', '--data', 'rows.csv']), ['data']))


# --- one case, in a child of its own --------------------------------------------------------

PACKAGE = str(Path(fisher_nodes.__file__).parent)

NAMED = ('`', "'", '"', '--', 'row ', '/', ' is not a file', '.json', '.yml', '.safetensors')

def is_clear(e, names=NAMED):
    "Whether an error is one bounded line of ours that names a file, a key or an option."
    text, last = str(e), e.__traceback__
    while last.tb_next: last = last.tb_next
    ours = last.tb_frame.f_code.co_filename.startswith(PACKAGE) or isinstance(e, OSError)
    return isinstance(e, (ValueError, TypeError, FileNotFoundError, OSError)) and ours and any(o in text for o in names) and is_line(text)

def is_line(text): return bool(text.strip()) and len(text) < 2500 and all(c.isprintable() for c in text)

def is_clear_line(text, status):
    lines = [o for o in text.splitlines() if o.startswith('fisher-nodes')]
    return status == 2 and len(lines) == 1 and is_line(lines[0]) and 'Traceback' not in text

def watch(here, seen):
    "Note every file outside that Python opens."
    bad = str(outside(here))
    def hook(event, args):
        if event == 'open' and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            if path.startswith(bad) or path in ('/etc/passwd', '/etc/hostname'): seen.append(path)
    sys.addaudithook(hook)

def child(door, here, pipe):
    "Run one door and say what came of it."
    os.chdir(here)
    size = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size+BYTES,)*2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    source, sink = os.pipe()
    os.write(sink, b'y\n'*20); os.close(sink); os.dup2(source, 0)
    sys.stdin = open(0)
    log = open(here.parent/'log', 'w+')
    os.dup2(log.fileno(), 1); os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = open(here.parent/'log', 'a')
    seen = []
    watch(here, seen)
    is_shell = door.startswith('shell')
    try:
        try: status = {**DOORS, **DATA_DOORS}[door][0](here)
        except SystemExit as e: status = e.code
        sys.stdout.flush()
        text = (here.parent/'log').read_text(errors='replace')
        if is_shell and status: found = ('clear' if is_clear_line(text, status) else 'unclear'), text[-1500:]
        else: found = ('unclear', text[-1500:]) if is_shell and 'Traceback' in text else ('fine', '')
    except Disagree as e: found = 'disagree', str(e)
    except BaseException as e:
        where = ''.join(traceback.format_exception(e)[-4:])[-1500:]
        found = ('clear', str(e)) if is_clear(e) else ('memory' if isinstance(e, MemoryError) else 'unclear', f'{type(e).__name__}: {e}\n{where}'[:3000])
    if seen: found = 'read outside', seen[0]
    os.write(pipe, json.dumps(found).encode()[:60000])
    os._exit(0)

def listing(folder): return {str(o): (o.lstat().st_mtime_ns, o.lstat().st_size) for o in sorted(folder.rglob('*'))}

def wait(pid, pipe):
    "What a child said, or how it ended."
    ready, _, _ = select.select([pipe], [], [], PATIENCE)
    if not ready:
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        return 'hang', ''
    text = b''
    while part := os.read(pipe, 65536): text += part
    _, status = os.waitpid(pid, 0)
    if text:
        try: return tuple(json.loads(text))
        except ValueError: return 'unclear', text.decode(errors='replace')[:500]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL): return 'hang', f'{SECONDS} s of work'
    return 'killed', f'status {status}'

def run_case(door, kind, seed, sandbox, work):
    "One input at one door: outcome, what was done to the input, what was said."
    here = work/'in'
    for o in (here, outside(here)): shutil.rmtree(o, ignore_errors=True)
    shutil.copytree(sandbox, here)
    outside(here).mkdir()
    (outside(here)/'secret.json').write_text(json.dumps({SECRET: SECRET}))
    shutil.copy(sandbox/'a'/'model.safetensors', outside(here)/'model.safetensors')
    done = KINDS[kind](here, random.Random(f'{door} {kind} {seed}'))
    before = listing(outside(here)) | {str(o): None for o in work.iterdir()}
    source, sink = os.pipe()
    if not (pid := os.fork()):
        os.close(source)
        try: child(door, here, sink)
        finally: os._exit(1)
    os.close(sink)
    outcome, said = wait(pid, source)
    os.close(source)
    after = listing(outside(here)) | {str(o): None for o in work.iterdir() if o.name != 'log'} | ({str(work/'log'): None} if str(work/'log') in before else {})
    if (outside(here)/'RAN').exists() or (here/'RAN').exists(): outcome = 'ran code'
    elif before != after: outcome = 'wrote outside'
    elif outcome == 'fine' and any(SECRET in o.read_text(errors='replace') for o in (*here.rglob('new/**/*.json'), *here.rglob('new/*.md'))): outcome = 'read outside'
    return outcome, done, said

def cases(number, doors=DOORS):
    "Some cases of every door, its kinds in turn."
    for door, (_, kinds) in doors.items():
        for i in range(number): yield door, kinds[i%len(kinds)], i

def run(number, doors=DOORS, seconds=None, tell=lambda *_: None, start=0):
    "Counts by door and outcome, and the cases that came out badly."
    counts, bad, began = {d: Counter() for d in doors}, [], time.time()
    with tempfile.TemporaryDirectory() as d:
        sandbox, work = Path(d)/'sandbox', Path(d)/'work'
        sandbox.mkdir(); work.mkdir(); (work/'log').touch()
        make_sandbox(sandbox)
        for make in {MORE[d]: None for d in doors if d in MORE}: make(sandbox)
        todo = list(cases(number, doors))
        if seconds: random.Random(start).shuffle(todo)
        for door, kind, i in todo:
            if seconds and time.time()-began > seconds: break
            outcome, done, said = run_case(door, kind, i+start, sandbox, work)
            counts[door][outcome] += 1
            if outcome not in GOOD: bad.append(dict(door=door, kind=kind, seed=i+start, outcome=outcome, done=done[:200], said=said.replace(d, '…')))
            tell(door, kind, i+start, outcome, done, said)
    return counts, bad

def earlier(path, doors):
    "The doors of a record that are not tried now, each with its commit, and the seconds of all; `ValueError` for other versions."
    said = json.loads(path.read_text())
    if said['versions'] != versions(): raise ValueError(f'{path} has versions {said["versions"]}, here are {versions()}')
    commits = said.get('commits', {})
    return [dict(door=d, commit=commits.get(d, said['commit']), counts=c) for d, c in said['doors'].items() if d not in doors], said['seconds']

if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--out', type=Path, required=True)
    p.add_argument('--number', type=int, default=500, help='cases a door')
    p.add_argument('--start', type=int, default=0, help='the first seed')
    p.add_argument('--door', nargs='+', default=list(DOORS), help='some of them; data doors by name')
    p.add_argument('--verbose', action='store_true')
    p.add_argument('--add', action='store_true', help='keep the other doors of FILE')
    args = p.parse_args()
    doors = {k: v for k, v in {**DOORS, **DATA_DOORS}.items() if k in args.door}
    tell = (lambda *o: print(*o[:4], o[4][:100].replace('\n', ' '), '|', o[5][:300].replace('\n', ' '), flush=True)) if args.verbose else (lambda *_: None)
    began = time.time()
    counts, bad = run(args.number, doors, tell=tell, start=args.start)
    kept, seconds = earlier(args.out, doors) if args.add else ([], 0)
    found = {o['door']: o for o in [*kept, *(dict(door=d, commit=find_commit(), counts=dict(c)) for d, c in counts.items())]}
    bad = [o for o in (json.loads(args.out.read_text())['bad'] if args.add else []) if o['door'] not in doors]+bad
    total = sum((Counter(o['counts']) for o in found.values()), Counter())
    write_record(args.out.absolute(), what='hostile inputs', cases=sum(total.values()), seconds=seconds+round(time.time()-began), total={o: total[o] for o in OUTCOMES},
                 doors={d: o['counts'] for d, o in found.items()}, commits={d: o['commit'] for d, o in found.items()}, bad=bad)
    for o in OUTCOMES: print(f'{o:14}{total[o]}')
    sys.exit(bool(bad))
