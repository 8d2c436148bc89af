"""Hostile inputs at every door, each in a forked child with 10 seconds of work and 1 GB, sorted by what came of it.

`python tests/faults/hostile.py --out FILE` runs 500 a door and writes the counts; tests/test_hostile.py runs a seeded sample.
A case is a door (what is called), a kind (which file is wrong) and a seed; the same three give the same input again."""
import argparse, json, os, random, resource, select, shutil, signal, socket, struct, sys, tempfile, time, traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

import torch
torch.set_num_threads(1)
import transformers
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models as words, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fisher_nodes
from fisher_nodes import Merged, evaluate, mask_fisher, merge, merge_files, run_recipe
from fisher_nodes.app.cli import main
from fisher_nodes.engine.files import write_record
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

KINDS = dict(config=on_config, tokenizer=on_tokenizer, index=on_index, names=on_names, header=on_header, card=on_card, report=on_report, fisher=on_fisher, merged=on_merged, recipe=on_recipe,
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
    shell_merged=(lambda h: main(['evaluate', str(h/'merged'), '--data', 'a=rows.csv', 'b=rows.csv']), ['report', 'merged']))
DATA_DOORS = dict(shell_fisher=(lambda h: main(['fisher', 'a', '--data', 'rows.csv', '--num-samples', '4', '--out', 'new.safetensors']), ['data']),
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
        todo = list(cases(number, doors))
        if seconds: random.Random(start).shuffle(todo)
        for door, kind, i in todo:
            if seconds and time.time()-began > seconds: break
            outcome, done, said = run_case(door, kind, i+start, sandbox, work)
            counts[door][outcome] += 1
            if outcome not in GOOD: bad.append(dict(door=door, kind=kind, seed=i+start, outcome=outcome, done=done[:200], said=said.replace(d, '…')))
            tell(door, kind, i+start, outcome, done, said)
    return counts, bad

if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--out', type=Path, required=True)
    p.add_argument('--number', type=int, default=500, help='cases a door')
    p.add_argument('--start', type=int, default=0, help='the first seed')
    p.add_argument('--door', nargs='+', default=list(DOORS), help='some of them; data doors by name')
    p.add_argument('--verbose', action='store_true')
    args = p.parse_args()
    doors = {k: v for k, v in {**DOORS, **DATA_DOORS}.items() if k in args.door}
    tell = (lambda *o: print(*o[:4], o[4][:100].replace('\n', ' '), '|', o[5][:300].replace('\n', ' '), flush=True)) if args.verbose else (lambda *_: None)
    began = time.time()
    counts, bad = run(args.number, doors, tell=tell, start=args.start)
    total = sum(map(Counter, counts.values()), Counter())
    write_record(args.out.absolute(), what='hostile inputs', cases=sum(total.values()), seconds=round(time.time()-began), total={o: total[o] for o in OUTCOMES},
                 doors={d: dict(c) for d, c in counts.items()}, bad=bad)
    for o in OUTCOMES: print(f'{o:14}{total[o]}')
    sys.exit(bool(bad))
