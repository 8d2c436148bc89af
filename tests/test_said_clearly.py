"""Everything that goes wrong is said in one line: what, where, what to do; in the shell in words of the shell."""
import json, shutil, subprocess, sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent/'faults'))
import hostile
from fisher_nodes import Merged, evaluate, mask_fisher, merge, merge_files
from fisher_nodes.app.cli import main
from fisher_nodes.engine.reading import is_memory_error
from fisher_nodes.methods.method import SHELL, in_shell
from reference import examples, tiny
from test_bad_input import refuses
from test_hostile import both, pair
from transformers import AutoModelForSequenceClassification

pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture(scope='module')
def sandbox(tmp_path_factory):
    where = tmp_path_factory.mktemp('said')/'sandbox'
    where.mkdir()
    hostile.make_sandbox(where)
    return where

@pytest.fixture
def here(sandbox, tmp_path): return shutil.copytree(sandbox, tmp_path/'in')

def shell(line, capsys, status=2):
    "The one line that a command answers with."
    try: found = main(line.split())
    except SystemExit as e: found = e.code
    err = [o for o in capsys.readouterr().err.splitlines() if o.startswith('fisher-nodes')]
    assert found==status and len(err)==1 and err[0].isprintable(), (found, err)
    return err[0]


# --- configurations -------------------------------------------------------------------------

CONFIGS = {
    'hidden_size a word': (dict(hidden_size='16'), "`hidden_size` must be a whole number, got '16'"), 'null': (dict(hidden_size=None), '`hidden_size` must be a whole number, got None'),
    'heads zero': (dict(num_attention_heads=0), '`num_attention_heads` must be a finite number of at least 1'), 'layers': (dict(num_hidden_layers=-1), '`num_hidden_layers`'),
    'id2label a list': (dict(id2label=['x', 'y']), '`id2label` must be a mapping'), 'id2label with a hole': (dict(id2label={'0': 'x', '2': 'y'}), '`id2label` must number its classes'),
    'num_labels': (dict(num_labels=5, id2label={'0': 'x', '1': 'y'}), '`num_labels` is 5, but `id2label` names 2 classes'), 'pad': (dict(pad_token_id=10**6), '`pad_token_id` is 1000000, beyond a vocabulary of 60'),
    'activation': (dict(hidden_act='evil'), "`hidden_act` is 'evil'"), 'dropout': (dict(hidden_dropout_prob='x'), '`hidden_dropout_prob`'), 'dtype': (dict(dtype='float99'), '`dtype` must be one of'),
    'quantised': (dict(quantization_config=dict(quant_method='gptq', bits=4)), 'the model is quantised'), 'architectures': (dict(architectures=3), '`architectures`'),
    'unknown type': (dict(model_type='evil'), 'cannot load .*evil'), 'list': ([], 'expected an object, got list'), 'layer_norm_eps': (dict(layer_norm_eps=[]), '`layer_norm_eps` must be a finite number')}

@pytest.mark.parametrize('change,says', CONFIGS.values(), ids=CONFIGS)
def test_configurations(change, says, here):
    import re
    path = here/'b'/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change if isinstance(change, dict) else change))
    said = both(here)
    assert re.search(says, said) and ('b/config.json' in said or f'cannot load {here}/b' in said), said
    for f in (lambda: evaluate(here/'b', Dataset.from_list(examples(4, 2))), lambda: mask_fisher(here/'b', Dataset.from_list(examples(4, 2)), progress=False)):
        with refuses(says): f()

def test_a_configuration_of_today_is_still_read(here):
    "Fields that are missing, null where they may be, or unknown."
    path = here/'b'/'config.json'
    config = json.loads(path.read_text())
    for k in ('id2label', 'label2id', 'pad_token_id', 'architectures'): config.pop(k, None)
    path.write_text(json.dumps(config | dict(problem_type=None, num_key_value_heads=None, x={'y': [1]}, _attn_implementation=None, quantization_config=None)))
    merge_files(pair(here), method='average', out=here/'new')


# --- what lies there instead ----------------------------------------------------------------

INSTEAD = dict(
    pickle=('pytorch_model.bin', 'pytorch_model.bin is a pickle, which can run code and is not read; `fisher-nodes convert '), onnx=('model.onnx', 'of ONNX'), gguf=('model.gguf', 'of GGUF'),
    tf=('tf_model.h5', 'of TensorFlow'), flax=('flax_model.msgpack', 'of Flax'), renamed=('consolidated.safetensors', 'is not named model.safetensors'))

@pytest.mark.parametrize('name,says', INSTEAD.values(), ids=INSTEAD)
def test_other_weights(name, says, here):
    (here/'b'/'model.safetensors').rename(here/'b'/name)
    said = both(here)
    assert says in said and f'cannot load {here}/b' in said

def test_an_adapter(here):
    (here/'b'/'adapter_config.json').write_text('{}')
    assert 'b has an adapter of PEFT beside model.safetensors; which is meant? Move one away' in both(here)
    for o in ('config.json', 'model.safetensors'): (here/'b'/o).unlink()
    assert 'b is an adapter of PEFT; pass merge_adapters=True (--merge-adapters) to merge it into its base' in both(here)

def test_checkpoints_of_a_training(here):
    (here/'runs').mkdir()
    (here/'b').rename(here/'runs'/'checkpoint-500')
    (here/'runs').rename(here/'b')
    assert 'it holds checkpoint-500, a checkpoint; give that' in both(here)

def test_a_file_in_place_of_its_folder(here):
    for name in ('model.safetensors', 'pytorch_model.bin'):
        (here/'b'/name).touch()
        with refuses(f'{name} is not a folder; give the folder of a model, such as .*/b$'): merge(dict(a=here/'a', b=here/'b'/name), method='average')

def test_an_empty_folder(here):
    shutil.rmtree(here/'b'); (here/'b').mkdir()
    assert 'the folder is empty' in both(here)

@pytest.mark.parametrize('name', ['model.safetensors', 'tokenizer.json', 'config.json'])
def test_pointers_of_git_lfs(name, here):
    (here/'b'/name).write_text(hostile.RAW[16])
    assert f'{name} is a pointer of Git LFS and not the file; get that with `git lfs pull`' in both(here)

@pytest.mark.parametrize('name,text,says', [('tokenizer.json', '{"model": 3}', 'tokenizer.json, cannot be read'), ('tokenizer.json', '', 'tokenizer.json, cannot be read'),
                                            ('tokenizer_config.json', '[]', 'tokenizer_config.json is not JSON'), ('special_tokens_map.json', '{', 'special_tokens_map.json is not JSON'),
                                            ('added_tokens.json', '\x80', 'added_tokens.json is not JSON')])
def test_tokenizers(name, text, says, here):
    (here/'b'/name).write_text(text)
    assert says in both(here)

def test_no_tokenizer_is_none(here):
    for t in 'ab':
        for o in (here/t).glob('*token*'): o.unlink()
    assert merge(pair(here), method='average').tokenizer is None

def test_a_model_without_a_tokenizer_is_named_and_not_the_rows(here):
    for o in (here/'b').glob('*token*'): o.unlink()
    rows = Dataset.from_dict(dict(text=['it'], label=[0]))
    for f in (lambda: merge(pair(here), data=dict(a=here/'rows.csv', b=here/'rows.csv')), lambda: merge(pair(here), data=[rows, rows]), lambda: mask_fisher(here/'b', rows)):
        with refuses('^.*/b has no tokenizer; give `tokenizer=`$'): f()

def test_rows_in_place_of_fishers(here):
    rows = Dataset.from_list(examples(4, 2))
    for given, says in ((here/'rows.csv', r'.*rows\.csv'), ('glue:rte', 'glue:rte'), (rows, 'Dataset'), ([dict(input_ids=torch.ones(1, 3))], 'list')):
        with refuses(f"^`fishers` of 'a': {says} is not a saved MaskFisher, but rows; give `data=`$"): merge(pair(here), dict(a=given, b=given))
        with refuses("is not a saved ParameterFisher, but rows"): merge(pair(here), [given, given], method='fisher')

def test_a_tokenizer_by_the_name_of_its_folder(here):
    from fisher_nodes import predict
    model = AutoModelForSequenceClassification.from_pretrained(here/'a')
    want = predict(here/'a', ['it'], progress=False)
    torch.testing.assert_close(predict(model, ['it'], tokenizer=str(here/'a'), progress=False), want, rtol=0, atol=0)
    with refuses('gone has no tokenizer'): predict(model, ['it'], tokenizer='gone')

def test_a_merged_model_asked_wrongly(here):
    both = merge(pair(here), method='average')
    with pytest.raises(KeyError, match=r"there is no task 'aa'; they are \['a', 'b'\]"): both['aa']
    assert 'aa' not in both and both.get('aa') is None and both['a'] is both.models['a']
    tokens = dict(input_ids=torch.tensor([[1, 2]]))
    with pytest.raises(TypeError, match=r'`logits` takes inputs by name, as `logits\(\*\*inputs\)`; got dict without a name'): both.logits(tokens)
    assert list(both.logits(**tokens)) == ['a', 'b']


# --- models in memory -----------------------------------------------------------------------

class Peft(torch.nn.Module):
    def merge_and_unload(self): ...

WRAPPED = dict(parallel=(torch.nn.DataParallel, 'DataParallel; it wraps a model, so give `model.module`'), compiled=(torch.compile, 'OptimizedModule; it wraps a model, so give `model._orig_mod`'),
               peft=(lambda m: Peft(), 'Peft; it wraps a model, so give `model.merge_and_unload'))

@pytest.mark.parametrize('wrap,says', WRAPPED.values(), ids=WRAPPED)
def test_wrappers(wrap, says):
    model = wrap(tiny(num_labels=2))
    rows = Dataset.from_list(examples(4, 2))
    with refuses("'beta'", says): merge(dict(alpha=tiny(num_labels=2), beta=model), method='average')
    for f in (lambda: mask_fisher(model, rows), lambda: evaluate(model, rows)):
        with refuses(says): f()

@pytest.mark.parametrize('name,says', [('is_quantized', 'quantised'), ('_hf_peft_config_loaded', 'adapters of PEFT')])
def test_models_that_were_changed(name, says):
    model = tiny(num_labels=2)
    setattr(model, name, True)
    with refuses("'beta'", says): merge(dict(alpha=tiny(num_labels=2), beta=model), method='average')


# --- reports --------------------------------------------------------------------------------

@pytest.mark.parametrize('change,says', [(dict(tasks=['a', 'b']), '`tasks`'), (dict(tasks={'a': 3}), "`tasks` of 'a'"), (dict(roles=3), '`roles`'), (dict(options=[]), '`options`'),
                                         (dict(zero_fisher={}), '`zero_fisher`'), (dict(scores={'a': {'f1': 'x'}}), '`scores`'), (dict(method=None), '`method` must be a word'),
                                         (dict(sentence_transformers=3), '`sentence_transformers`'), (dict(versions=None), '`versions`'), (dict(base_source=3), '`base_source`')])
def test_reports(change, says, here):
    path = here/'merged'/'merge_report.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with refuses('merge_report.json is not a merge report', says): Merged.from_pretrained(here/'merged')


# --- the shell ------------------------------------------------------------------------------

WORDS = {
    'merge a=a b=b --out new': 'needs either --fisher or --data, got neither', 'merge a=a b=b --method ties --out new': 'needs --base, the model',
    'merge a=a b=b --method average --base a --out new': 'takes no --base', 'merge a=a b=b --method average --precision bf16 --out new': '--precision says how to measure, but without --data',
    'merge a=a b=b --method average --weights a=-1 b=1 --out new': "--weights of 'a' is -1.0", 'merge a=a b=b --method average --weights a=x b=1 --out new': "could not convert 'x' to a number",
    'merge a=a b=b --method average --max-shard-size x --out new': "--max-shard-size is 'x'", 'merge a=a b=b --method average --out a': 'is not empty',
    'merge a=a b=b --method average --seed 99999999999999999999999 --out new': '--seed: expected a whole number', 'merge a=a b=b --method average --out merged': 'give --overwrite to replace it',
    f'merge a=a b=b --method average --num-samples {"9"*5000} --out new': '--num-samples: expected a whole number', 'fisher a --data rows.csv --max-length ² --out x': '--max-length: expected a whole',
    'merge merged --out new': 'merged is a folder, not a recipe; give its recipe, merged/recipe.yml', 'merge merged --method average --out new': 'give its recipe, merged/recipe.yml',
    'merge a --out new': 'a is a folder, not a recipe; give TASK=MODEL for each model, or a recipe file',
    'merge a=a b=b --fisher a=rows.csv b=rows.csv --out new': 'rows.csv is not a saved MaskFisher, but rows; give --data', f'merge a=a b=b --method ties --base a --options density={"["*3000} --out new': '`density` is'}

@pytest.mark.parametrize('line,says', WORDS.items(), ids=range(len(WORDS)))
def test_words_of_the_shell(line, says, here, capsys, monkeypatch):
    monkeypatch.chdir(here)
    said = shell(line, capsys)
    assert says in said and len(said)<2200 and not any(f'`{k}' in said for k in SHELL), said

def test_a_recipe_keeps_its_own_words(here, capsys, monkeypatch):
    monkeypatch.chdir(here)
    Path('r.yml').write_text('models: {a: ./a, b: ./b}\nmethod: mask-fisher\n')
    assert 'needs either `fishers` or `data`' in shell('merge r.yml --out new', capsys)

def test_in_shell():
    assert in_shell('a/recipe.yml: `models` must be')=='a/recipe.yml: `models` must be'
    assert in_shell('`num_samples` and `label`, `scheme=`; pass overwrite=True (--overwrite) to')=='--num-samples and `label`, --scheme; give --overwrite to'

def test_a_bug_is_called_one(capsys, monkeypatch):
    "Also an error that Python raises in our own code, or a library, of a type that we raise ourselves."
    for error in (KeyError('x'), AttributeError('no y'), AssertionError(), ZeroDivisionError('z'), RuntimeError('size mismatch')):
        def fail(*_): raise error
        monkeypatch.setattr('fisher_nodes.app.cli.parse_pairs', fail)
        said = shell('merge a=a b=b --method average --out new', capsys, status=1)
        assert f'this is a bug of fisher_nodes ({type(error).__name__}: ' in said and 'FISHER_NODES_DEBUG=1' in said
    monkeypatch.setattr('fisher_nodes.app.cli.parse_pairs', lambda *_: 1+'a')
    assert 'this is a bug of fisher_nodes (TypeError' in shell('merge a=a b=b --method average --out new', capsys, status=1)
    monkeypatch.setenv('FISHER_NODES_DEBUG', '1')
    with pytest.raises(TypeError): main('merge a=a b=b --method average --out new'.split())

@pytest.mark.parametrize('error', [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes. Error code 12"),
                                   RuntimeError("can't start new thread"), OSError(12, 'Cannot allocate memory'), ImportError('libx.so: failed to map segment from shared object'),
                                   torch.cuda.OutOfMemoryError('CUDA out of memory'), RuntimeError('Resource temporarily unavailable')], ids=lambda e: type(e).__name__)
def test_too_little_memory(error, capsys, monkeypatch):
    assert is_memory_error(error)
    def fail(*_): raise error
    monkeypatch.setattr('fisher_nodes.app.cli.parse_pairs', fail)
    assert 'not enough memory, or too many threads' in shell('merge a=a b=b --method average --out new', capsys)

def test_recursion(capsys, monkeypatch):
    "A function of `*args` that calls itself has no limit in Python 3.13.0, so the one that does takes none."
    def deeper(): return deeper()
    def fail(*_): return deeper()
    monkeypatch.setattr('fisher_nodes.app.cli.parse_pairs', fail)
    assert 'nested too deeply' in shell('merge a=a b=b --method average --out new', capsys)

@pytest.mark.parametrize('megabytes', [100, 500, 900])
def test_a_limit_of_memory(megabytes, here):
    "In a process of its own: importing torch with so little may abort, or never end."
    import resource
    def limit(): resource.setrlimit(resource.RLIMIT_AS, (megabytes*2**20,)*2)
    code = 'import sys; from fisher_nodes.app.cli import main; sys.exit(main())'
    done = subprocess.run([sys.executable, '-c', code, *'merge a=a b=b --method average --out new'.split()], cwd=here, preexec_fn=limit, capture_output=True, text=True, timeout=100)
    assert done.returncode==2 and done.stderr.count('\n')==1 and f'this shell allows {megabytes} MB' in done.stderr, done.stderr
