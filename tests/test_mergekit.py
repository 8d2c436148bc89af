"""The real mergekit and sentence-transformers with our methods: `make plugins` runs these in an environment that has both."""
import ast
import hashlib
import json
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (AutoModelForSequenceClassification, BertConfig, BertModel, DistilBertConfig,
                          DistilBertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification)

from fisher_nodes import Grams, MaskFisher, linear_grams, mask_fisher, merge
from fisher_nodes.app.cli import main
from fisher_nodes.core.fisher import part_name
from fisher_nodes.core.places import count_nodes
from fisher_nodes.engine.fingerprints import hash_weights
from fisher_nodes.engine.importance import expand_importance
from fisher_nodes.methods.method import METHODS
from fisher_nodes.methods.regmean import gram_shapes
from fisher_nodes.plugins import mergekit as plugin
from reference import ragged_batches, tiny
from test_cli import WORDS, save_model

ROOT = Path(__file__).resolve().parent.parent
FILE, GRAMS = 'mask-fisher.safetensors', 'grams.safetensors'
QUIET = dict(progress=False)

def needs(*names):
    gone = [o for o in names if find_spec(o) is None]
    return pytest.mark.skipif(bool(gone), reason=f'{" and ".join(gone)} not installed; `make plugins` makes an environment with it')

needs_mergekit, needs_both = needs('mergekit'), needs('mergekit', 'sentence_transformers')

def weights_of(folder):
    "The tensors of a folder."
    return load_file(Path(folder)/'model.safetensors')

def measured(folder, seed):
    "Measure what lies in a folder, and lay the result beside it."
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    mask_fisher(model, ragged_batches(num_labels=2, vocab=len(WORDS), seed=seed), **QUIET).save(folder/FILE)

@pytest.fixture
def pair(tmp_path):
    for i, t in enumerate('ab'):
        save_model(tmp_path/t, seed=i)
        measured(tmp_path/t, i)
    return {t: tmp_path/t for t in 'ab'}

@pytest.fixture
def with_grams(pair):
    "The pair, with Gram matrices of other rows beside each."
    for i, o in enumerate(pair.values()):
        linear_grams(o, ragged_batches(num_labels=2, vocab=len(WORDS), seed=i), **QUIET).save(o/GRAMS)
    return pair

def ours(pair, weights=(1, .5), method='mask-fisher', **kw):
    "Our merge of the same bodies, by the names of their files, and the averaged heads."
    files = {t: o/(GRAMS if method=='regmean' else FILE) for t, o in pair.items()}
    merged = merge(pair, files, method=method, weights=list(weights), **kw, **QUIET)
    out = {f'bert.{n}': p.detach() for n, p in merged.body.named_parameters()}
    for n in ('classifier.weight', 'classifier.bias'):
        out[n] = sum(w*weights_of(o)[n].double() for w, o in zip(weights, pair.values())).div(sum(weights)).float()
    return out

def close(got, want, rtol=2e-6, atol=1e-8):
    assert set(got)==set(want)
    for k, v in want.items(): assert_close(got[k], v, rtol=rtol, atol=atol, msg=lambda m: f'{k}: {m}')

def is_not_the_average(got, pair):
    "What a method that does nothing would give."
    name = 'bert.encoder.layer.0.attention.self.query.weight'
    a, b = (weights_of(o)[name] for o in pair.values())
    assert (got[name]-(a+.5*b)/1.5).abs().max()>1e-3

def write_yaml(path, pair, weights=(1, .5), method='mask_fisher', top='', **more):
    each = ''.join(f'  - model: {o}\n    parameters: {json.dumps(dict(weight=w) | more.get(t, {}))}\n' for (t, o), w in zip(pair.items(), weights))
    path.write_text(f'merge_method: {method}\nmodels:\n{each}{top}')
    return path


# --- agreement --------------------------------------------------------------------------------

@needs_mergekit
@pytest.mark.parametrize('given', ['folders', 'files', 'expanded'])
def test_their_python_api(given, pair, tmp_path):
    from mergekit.merge_methods import merge_state_dicts
    paths = {'folders': list(pair.values()), 'files': [o/FILE for o in pair.values()], 'expanded': [tmp_path/f'{t}.e.safetensors' for t in pair]}[given]
    if given=='expanded':
        for path, o in zip(paths, pair.values()): expand_importance(MaskFisher.load(o/FILE), AutoModelForSequenceClassification.from_pretrained(o)).save(path)
    got = merge_state_dicts({t: weights_of(o) for t, o in pair.items()}, 'mask_fisher', parameters=dict(importance=list(map(str, paths)), weight=[1., .5]))
    close(got, ours(pair))
    is_not_the_average(got, pair)

@needs_mergekit
def test_a_shell_runs_their_file(pair, tmp_path, capsys):
    "Same bits as our merge; it loads with transformers; a second run needs `--overwrite`."
    config = write_yaml(tmp_path/'m.yml', pair)
    line = f'mergekit {config} {tmp_path/"out"}'
    assert not main([*line.split(), '--json']), capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)=={'method': 'mask_fisher', 'models': list(map(str, pair.values())), 'wrote': str(tmp_path/'out')}
    got = {n: p.detach() for n, p in AutoModelForSequenceClassification.from_pretrained(tmp_path/'out').named_parameters()}
    close(got, ours(pair))
    for k, v in ours(pair).items():
        if k.startswith('bert.'): assert torch.equal(got[k], v), k
    is_not_the_average(got, pair)
    record = json.loads((tmp_path/'out'/'mergekit.json').read_text())
    assert record['versions'].keys()>={'mergekit', 'torch', 'fisher_nodes'} and 'model.safetensors' in record['files']
    assert main(line.split())==2 and 'is not empty' in capsys.readouterr().err
    assert not main([*line.split(), '--overwrite'])
    (tmp_path/'out'/'mine.txt').write_text('mine')
    assert not main([*line.split(), '--overwrite']) and (tmp_path/'out'/'mine.txt').read_text()=='mine'

@needs_mergekit
def test_files_and_schemes_in_yaml(pair, tmp_path):
    config = write_yaml(tmp_path/'m.yml', pair, top='parameters: {scheme: with-value}\n', b=dict(importance=str(pair['b']/FILE)))
    plugin.run_config(config, tmp_path/'out')
    close(weights_of(tmp_path/'out'), ours(pair, scheme='with-value'))

@needs_mergekit
def test_the_other_methods_of_theirs_still_run(pair, tmp_path):
    plugin.run_config(write_yaml(tmp_path/'m.yml', pair, method='linear'), tmp_path/'out')
    a, b = map(weights_of, pair.values())
    close(weights_of(tmp_path/'out'), {k: (a[k].double()+.5*b[k].double()).div(1.5).float() for k in a})

@needs_both
def test_cross_encoders(pair, tmp_path):
    from sentence_transformers import CrossEncoder
    merged = CrossEncoder.merge(list(map(str, pair.values())), method='mask_fisher', parameters=dict(importance=list(map(str, pair.values())), weight=[1., .5]))
    merged.save_pretrained(str(tmp_path/'out'))
    got = {n: p.detach() for n, p in AutoModelForSequenceClassification.from_pretrained(tmp_path/'out').named_parameters()}
    close(got, ours(pair))
    is_not_the_average(got, pair)

@needs_both
def test_sentence_transformers(pair, tmp_path):
    "The body of the measured model in a wrapper with a pooling and a dense layer behind it; the files are of the model with its head."
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
    folders = {}
    for t, o in pair.items():
        torch.manual_seed(ord(t))
        body = Transformer(str(o))
        SentenceTransformer(modules=[body, Pooling(16), Dense(16, 8)]).save_pretrained(str(tmp_path/f'st-{t}'))
        folders[t] = str(tmp_path/f'st-{t}')
    merged = SentenceTransformer.merge(list(folders.values()), method='mask_fisher', parameters=dict(importance=[str(o/FILE) for o in pair.values()], weight=[1., .5]))
    want = {k.removeprefix('bert.'): v for k, v in ours(pair).items() if k.startswith('bert.')}
    got = {n.partition('model.')[2]: p.detach() for n, p in merged[0].named_parameters()}
    close(got, want)
    dense = [load_file(next(Path(o).glob('2_*'))/'model.safetensors')['linear.weight'].double() for o in folders.values()]
    assert_close(merged[2].linear.weight.detach(), ((dense[0]+.5*dense[1])/1.5).float(), rtol=1e-5, atol=1e-8)
    assert merged.encode(['it rains']).shape==(1, 8)

QUERY = 'bert.encoder.layer.0.attention.self.query.weight'

@needs_mergekit
@pytest.mark.parametrize('options', [{}, dict(off_diagonal=.5), dict(anchor=.3)], ids=str)
@pytest.mark.parametrize('given', ['folders', 'files'])
def test_grams_in_their_python_api(given, options, with_grams):
    "As our merge; and one weight as the normal equations say."
    from mergekit.merge_methods import merge_state_dicts
    paths = [str(o if given=='folders' else o/GRAMS) for o in with_grams.values()]
    states = {t: weights_of(o) for t, o in with_grams.items()}
    got = merge_state_dicts(states, 'regmean', parameters=dict(importance=paths, weight=[1., .5]) | options)
    close(got, ours(with_grams, method='regmean', **options))
    is_not_the_average(got, with_grams)
    if 'anchor' in options: return
    left, right, keep = 0, 0, options.get('off_diagonal', .9)
    for w, (t, o) in zip((1, .5), with_grams.items()):
        G = load_file(o/GRAMS)[QUERY.removeprefix('bert.')].double()
        G = w*(keep*G+(1-keep)*torch.diag(torch.diag(G)))
        left, right = left+G, right+G@states[t][QUERY].double().T
    assert_close(got[QUERY].double(), torch.linalg.solve(left, right).T, rtol=1e-4, atol=1e-7)

@needs_mergekit
def test_grams_in_a_shell(with_grams, tmp_path, capsys):
    config = write_yaml(tmp_path/'m.yml', with_grams, method='regmean', top='parameters: {off_diagonal: 0.5}\n')
    assert not main(f'mergekit {config} {tmp_path/"out"} --json'.split()), capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)['method']=='regmean'
    got, want = weights_of(tmp_path/'out'), ours(with_grams, method='regmean', off_diagonal=.5)
    close(got, want)
    for k, v in want.items():
        if k.startswith('bert.'): assert torch.equal(got[k], v), k
    is_not_the_average(got, with_grams)
    assert not torch.allclose(got[QUERY], ours(with_grams)[QUERY])

@needs_both
def test_grams_in_sentence_transformers(with_grams, tmp_path):
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    asked = dict(importance=list(map(str, with_grams.values())), weight=[1., .5])
    want = ours(with_grams, method='regmean')
    merged = CrossEncoder.merge(asked['importance'], method='regmean', parameters=dict(asked))
    merged.save_pretrained(str(tmp_path/'out'))
    close({n: p.detach() for n, p in AutoModelForSequenceClassification.from_pretrained(tmp_path/'out').named_parameters()}, want)
    for t, o in with_grams.items(): SentenceTransformer(modules=[Transformer(str(o)), Pooling(16)]).save_pretrained(str(tmp_path/f'st-{t}'))
    bodies = SentenceTransformer.merge([str(tmp_path/f'st-{t}') for t in with_grams], method='regmean', parameters=dict(asked))
    got = {n.partition('model.')[2]: p.detach() for n, p in bodies[0].named_parameters()}
    close(got, {k.removeprefix('bert.'): v for k, v in want.items() if k.startswith('bert.')})

@needs_mergekit
def test_options_are_those_of_merge():
    from mergekit.merge_methods import get
    theirs = {o.name: o.default for o in get('regmean').spec.parameters if o.name not in ('importance', 'weight')}
    assert theirs==METHODS['regmean'].options=={'off_diagonal': .9, 'anchor': 0.}

SIZE = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
FAMILIES = dict(
    gpt2=lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=20, bos_token_id=0, eos_token_id=0)),
    llama=lambda: LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    distilbert=lambda: DistilBertForSequenceClassification(DistilBertConfig(vocab_size=40, dim=16, hidden_dim=24, n_layers=2, n_heads=4)),
    vit=lambda: ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=4, patch_size=2)),
    bare=lambda: BertModel(BertConfig(**SIZE)))

def fishers_of(models):
    "Made up; the first node of each kind has none in any model."
    gen = torch.Generator().manual_seed(7)
    for m in models.values():
        kinds = {part_name(k): tuple(torch.rand(n, generator=gen) for n in layers) for k, layers in count_nodes(m).items()}
        for o in kinds.values(): o[0][0] = 0
        yield MaskFisher(**kinds, num_examples=4, meta=dict(weight_hash=hash_weights(m), variant='paper', estimator='empirical'))

def grams_of(models):
    "Made up: of more tokens than inputs, and none for the first input of any weight."
    gen = torch.Generator().manual_seed(8)
    for m in models.values():
        rows = {n: torch.randn(2*shape[0], shape[0], generator=gen) for n, shape in gram_shapes(m).items()}
        for x in rows.values(): x[:,0] = 0
        yield Grams({n: x.T@x for n, x in rows.items()}, num_examples=4, meta=dict(weight_hash=hash_weights(m)))

@needs_mergekit
@pytest.mark.parametrize('method', plugin.USES)
@pytest.mark.parametrize('kind', FAMILIES)
def test_other_families_from_their_files(kind, method, tmp_path):
    "The names in files are not always the model's: those of a ViT are older. Fused matrices, key heads, tied words."
    models = {}
    for i, t in enumerate('ab'):
        torch.manual_seed(i)
        models[t] = FAMILIES[kind]()
        models[t].save_pretrained(tmp_path/t)
    made, file = (fishers_of, FILE) if method=='mask_fisher' else (grams_of, GRAMS)
    for t, f in zip(models, made(models)): f.save(tmp_path/t/file)
    folders = {t: tmp_path/t for t in models}
    from mergekit.merge_methods import merge_state_dicts
    asked = dict(importance=[str(o) for o in folders.values()], weight=[1., .5])
    by_file = merge_state_dicts([weights_of(o) for o in folders.values()], method, parameters=asked)
    by_model = merge_state_dicts([m.state_dict() for m in models.values()], method, parameters=asked)
    save_file({k: v.contiguous() for k, v in by_file.items()}, tmp_path/'b'/'model.safetensors', dict(format='pt'))
    again = type(models['a']).from_pretrained(tmp_path/'b').state_dict()
    want = merge(models, fishers={t: tmp_path/t/file for t in models}, method=method.replace('_', '-'), weights=[1, .5], **QUIET)
    prefix = '' if want.body is want['a'] or not any(k.startswith(want['a'].base_model_prefix+'.') for k in again) else want['a'].base_model_prefix+'.'
    for n, p in want.body.named_parameters():
        for got in (again, by_model): assert_close(got.get(prefix+n, got.get(n)), p.detach(), rtol=2e-6, atol=1e-8, msg=lambda m: f'{n}: {m}')
    plain = merge(models, method='average', weights=[1, .5], **QUIET)
    assert any(not torch.allclose(p, q) for p, q in zip(want.body.parameters(), plain.body.parameters()))


# --- what is refused --------------------------------------------------------------------------

@pytest.fixture
def unlike(tmp_path):
    for i, t in enumerate('ab'):
        save_model(tmp_path/t, 2+i, seed=i)
        measured(tmp_path/t, i)
    return {t: tmp_path/t for t in 'ab'}

@needs_mergekit
def test_other_heads_in_yaml(unlike, tmp_path, capsys):
    assert main(f'mergekit {write_yaml(tmp_path/"m.yml", unlike)} {tmp_path/"out"}'.split())==2
    said, = [o for o in capsys.readouterr().err.splitlines() if o.startswith('fisher-nodes')]
    assert 'classifier' in said and 'keeps a head for each task' in said and 'fisher-nodes merge' in said
    assert not (tmp_path/'out').exists()
    merge(unlike, fishers='beside', **QUIET) # what it says to use

@needs_both
def test_other_heads_in_sentence_transformers(unlike):
    from sentence_transformers import CrossEncoder
    with pytest.raises(ValueError, match='keeps a head for each task'), plugin.heads_explained():
        CrossEncoder.merge(list(map(str, unlike.values())), method='mask_fisher', parameters=dict(importance=list(map(str, unlike.values()))))

@needs_both
def test_sentence_transformers_without_files(pair):
    from sentence_transformers import CrossEncoder
    with pytest.raises(ValueError, match='give `importance`, for each model a file'): CrossEncoder.merge(list(map(str, pair.values())), method='mask_fisher')

def refused(config, out, says):
    with pytest.raises((ValueError, OSError), match=says) as e: plugin.run_config(config, out)
    assert '\n' not in str(e.value) and not Path(out).exists()

@needs_mergekit
def test_what_their_file_may_not_ask(pair, tmp_path):
    out, config = tmp_path/'out', tmp_path/'m.yml'
    def ask(says, **kw): refused(write_yaml(config, **(dict(pair=pair) | kw)), out, says)
    (pair['a']/FILE).rename(tmp_path/'kept')
    ask('no mask-fisher.safetensors beside the model')
    (pair['a']/FILE).write_bytes((pair['b']/FILE).read_bytes())
    ask('measured on other weights')
    (tmp_path/'kept').rename(pair['a']/FILE)
    ask('importance .*none.safetensors is no file', a=dict(importance='none.safetensors'))
    ask('not negative and not all zero', weights=(-1, 2))
    ask('not all zero', weights=(0, 0))
    ask("`scheme` is 'soup'", top='parameters: {scheme: soup}\n')
    ask('has an adapter', pair={'a': f'{pair["a"]}+{pair["b"]}', 'b': pair['b']})
    ask('Unimplemented merge method soup', method='soup')
    config.write_text(f'merge_method: mask_fisher\nslices:\n  - sources:\n      - {{model: {pair["a"]}, layer_range: [1, 2]}}\n      - {{model: {pair["b"]}, layer_range: [1, 2]}}\n')
    refused(config, out, 'mask_fisher takes `models`')
    config.write_text('merge_method: [')
    refused(config, out, 'm.yml is not YAML')
    config.write_text('merge_method: linear\n')
    refused(config, out, 'm.yml: .*Exactly one of')
    with pytest.raises(ValueError, match='is, holds or lies in the model'): plugin.run_config(write_yaml(config, pair), pair['a']/'out')

@needs_mergekit
def test_what_grams_may_not_be(with_grams, tmp_path):
    pair, out, config = with_grams, tmp_path/'out', tmp_path/'m.yml'
    a, b = pair.values()
    def ask(says, method='regmean', **kw): refused(write_yaml(config, **(dict(pair=pair, method=method) | kw)), out, says)
    ask(f'{a/FILE} is not a saved Grams; its kind is MaskFisher', a=dict(importance=str(a/FILE)))
    ask(f'{a/GRAMS} is not a saved MaskFisher; its kind is Grams', method='mask_fisher', a=dict(importance=str(a/GRAMS)))
    ask(f'{a/GRAMS}: what it holds was measured on other weights', b=dict(importance=str(a/GRAMS)))
    ask('importance .*none.safetensors is no file', a=dict(importance='none.safetensors'))
    ask('not negative and not all zero', weights=(-1, 2))
    ask('`off_diagonal` is 2.0; expected a finite number of at most 1', top='parameters: {off_diagonal: 2}\n')
    ask("m.yml: .*valid number.*'x'", top='parameters: {anchor: x}\n')
    ask('bert.*weight: the sum of the grams cannot be inverted with off_diagonal=1.0', top='parameters: {off_diagonal: 1}\n')
    config.write_text(f'merge_method: regmean\nslices:\n  - sources:\n      - {{model: {a}, layer_range: [1, 2]}}\n      - {{model: {b}, layer_range: [1, 2]}}\n')
    refused(config, out, 'regmean takes `models`')
    grams = Grams.load(a/GRAMS)
    def lay(values):
        (a/GRAMS).unlink()
        Grams(values, 4, grams.meta).save(a/GRAMS)
    name = QUERY.removeprefix('bert.')
    lay(dict(grams.values) | {name: torch.eye(24)})
    ask(rf'{a/GRAMS}: Grams, {name}: shape \(24, 24\), expected \(16, 16\)')
    lay({n: v for n, v in grams.values.items() if n!=name})
    ask(f'{a/GRAMS}: Grams does not fit the model: missing ..{name}')
    lay(dict(grams.values) | {name: grams.values[name].triu()})
    ask(f'{name}: not symmetric')
    lay(grams.values)
    spoilt = bytearray((a/GRAMS).read_bytes())
    spoilt[-1] ^= 1
    (a/GRAMS).write_bytes(spoilt)
    ask(f'{a/GRAMS} is damaged, or was changed')
    (a/GRAMS).unlink()
    ask('no grams.safetensors beside the model')

@needs_mergekit
def test_grams_without_their_model(with_grams, tmp_path):
    from mergekit.merge_methods import merge_state_dicts
    states = [weights_of(o) for o in with_grams.values()]
    for t, o in with_grams.items(): (tmp_path/f'{t}.safetensors').write_bytes((o/GRAMS).read_bytes())
    def ask(says, states=states, **kw):
        with pytest.raises(ValueError, match=says) as e: merge_state_dicts(states, 'regmean', parameters=kw)
        assert '\n' not in str(e.value)
    ask('give `importance`, for each model a file')
    ask('a.safetensors has grams of weights, and there is no model beside it', importance=[str(tmp_path/f'{t}.safetensors') for t in 'ab'])
    narrow = [{QUERY: o[QUERY][:,:8]} for o in states]
    beside = list(map(str, with_grams.values()))
    ask(rf'{GRAMS}: a Gram matrix of shape \(16, 16\) for {QUERY}, which is \(16, 8\)', states=narrow, importance=beside)
    ask('knows no tensor bert.encoder.layer.9.x.weight', states=[{'bert.encoder.layer.9.x.weight': torch.ones(2, 2)}]*2, importance=beside)

@needs_mergekit
def test_no_pickle_is_loaded(pair, tmp_path, monkeypatch):
    "A model that has only a pickle is refused before mergekit looks at it."
    marker = tmp_path/'ran'
    class Evil:
        def __reduce__(self): return (Path.touch, (marker, ))
    (pair['a']/'model.safetensors').unlink()
    torch.save(dict(x=Evil()), pair['a']/'pytorch_model.bin')
    refused(write_yaml(tmp_path/'m.yml', pair), tmp_path/'out', 'has no model.safetensors')
    (pair['a']/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=dict(x='pytorch_model.bin'))))
    refused(write_yaml(tmp_path/'m.yml', pair), tmp_path/'out', 'is not an index of weights')
    assert not marker.exists()

@needs_mergekit
def test_nothing_outside_the_folder_and_no_network(pair, tmp_path, monkeypatch):
    def no_network(*_): raise AssertionError('network')
    monkeypatch.setattr(socket.socket, 'connect', no_network)
    monkeypatch.setenv('HOME', str(tmp_path/'home')); monkeypatch.setenv('TMPDIR', str(tmp_path/'tmp')); (tmp_path/'tmp').mkdir()
    def files(): return {o: hashlib.sha256(o.read_bytes()).hexdigest() for o in tmp_path.rglob('*') if o.is_file() and tmp_path/'out' not in o.parents}
    config = write_yaml(tmp_path/'m.yml', pair)
    before = files()
    plugin.run_config(config, tmp_path/'out')
    assert files()==before
    assert sorted(o.name for o in (tmp_path/'out').iterdir())==['README.md', 'config.json', 'mergekit.json', 'mergekit_config.yml', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']

@needs_mergekit
def test_registered_once_by_importing():
    code = 'import fisher_nodes.plugins.mergekit as p; from mergekit import merge_methods as m; p.register(); print(*[m.get(o).spec.name for o in p.USES])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()==['mask_fisher', 'regmean']

@needs_mergekit
def test_a_method_of_theirs_is_not_taken_for_ours():
    code = """from mergekit.merge_methods import TensorGroup, merge_method, registry
from torch import Tensor
def regmean(group:TensorGroup)->Tensor: return group.tensors[0]
registry.register(merge_method(regmean, name='regmean'))
import fisher_nodes.plugins.mergekit"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode and "'regmean' is already registered" in done.stderr

def test_without_mergekit_the_rest_runs(tmp_path):
    "The module imports, and says what is needed; nothing else imports it."
    code = '''import sys
sys.modules['mergekit'] = sys.modules['sentence_transformers'] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, *a: None if n=='mergekit' else find(n, *a)
import fisher_nodes.merging.run, fisher_nodes.engine.importance
assert 'fisher_nodes.plugins' not in sys.modules
from fisher_nodes.app.cli import main
from fisher_nodes.plugins import mergekit
sys.exit(main(['mergekit', 'none.yml', 'out']))'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode==2 and "python -m pip install 'fisher_nodes[mergekit]'" in done.stderr and 'Traceback' not in done.stderr, done.stderr

@needs_both
def test_the_cells_of_the_page_run(pair, tmp_path, monkeypatch):
    "As they are typed, in a folder with `one` and `two`."
    for a, b in zip(pair.values(), ('one', 'two')): a.rename(tmp_path/b)
    monkeypatch.chdir(tmp_path)
    page = json.loads((ROOT/'nbs'/'plugins'/'00_mergekit.ipynb').read_text(encoding='utf-8'))
    cells = [''.join(o['source']) for o in page['cells'] if o['cell_type']=='code' and '#| eval: false' in ''.join(o['source'])]
    names = {o: AutoModelForSequenceClassification.from_pretrained(o) for o in ('one', 'two')}
    names |= {f'rows_of_{o}': ragged_batches(num_labels=2, vocab=len(WORDS), seed=i) for i, o in enumerate(('one', 'two'))}
    for o in cells: exec(compile(ast.parse(o), 'cell', 'exec'), names)
    assert len(cells)==8 and (tmp_path/'both'/'model.safetensors').is_file()
    close(names['by_grams'], ours({'a': tmp_path/'one', 'b': tmp_path/'two'}, method='regmean'))
    text = next(''.join(o['source']) for o in page['cells'] if '```yaml' in ''.join(o['source']))
    (tmp_path/'merge.yml').write_text(text.split('```yaml\n')[1].split('```')[0])
    (tmp_path/'measured').mkdir()
    (tmp_path/'measured'/'two.safetensors').write_bytes((tmp_path/'two'/FILE).read_bytes())
    line = next(o for o in text.splitlines() if o.startswith('fisher-nodes mergekit')).replace('both', 'yaml-both').split()[1:]
    assert not main(line)
    close(weights_of(tmp_path/'yaml-both'), ours({'a': tmp_path/'one', 'b': tmp_path/'two'}))


# --- their methods and ours -------------------------------------------------------------------

@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    "Tiny models near one base, in float64, as `tools/compare_mergekit.py` compares real ones."
    here = tmp_path_factory.mktemp('compared')
    sys.path.insert(0, str(ROOT/'tools'))
    from compare_mergekit import agreements
    base, models, fishers = tiny(std=.3), {}, {}
    for i, t in enumerate('ab'):
        models[t] = tiny(std=.3)
        gen = torch.Generator().manual_seed(50+i)
        with torch.no_grad():
            for p in models[t].parameters(): p.add_(torch.randn(p.shape, generator=gen, dtype=p.dtype)*.05)
    for t, f in zip(models, fishers_of(models)):
        fishers[t] = here/f'{t}.safetensors'
        expand_importance(f, models[t]).save(fishers[t])
        f.save(here/f'{t}.nodes')
    return agreements(models, base, fishers, {t: here/f'{t}.nodes' for t in models})

AGREE = ['linear', 'linear, normalize: false', 'task_arithmetic', 'task_arithmetic, normalize: true', 'ties, density 1',
         'ties, density 0.2, trimmed in each tensor', 'dare_linear, same masks, 1/density', 'mask_fisher']
DIFFER = ['ties, density 0.2, as each does it', 'dare_linear, same masks, as each does it']
WITH_SIGNS = 'ties, density 1, signs of sums near 0 included' # in float64 no sum is so near 0 that its sign is lost

@needs_mergekit
@pytest.mark.parametrize('name', AGREE)
def test_the_same_merge_is_the_same_numbers(name, compared):
    assert compared[name]<1e-7, compared

@needs_mergekit
@pytest.mark.parametrize('name', DIFFER)
def test_conventions_that_differ_do_differ(name, compared):
    "Trimmed in each tensor or over the whole model; scaled up by 1/density or to the same sum of sizes."
    assert 1e-4<compared[name]<1

@needs_mergekit
def test_every_comparison_is_looked_at(compared):
    assert set(compared)=={*AGREE, *DIFFER, WITH_SIGNS}
    assert compared['ties, density 1']<=compared[WITH_SIGNS]
