"""LoRA adapters: added to the base that they name, as written down by hand and as `peft` does it; a caller's `PeftModel` stays as it is; all else is refused in one line."""
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel, GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForCausalLM,
                          LlamaForSequenceClassification)

sys.path.insert(0, str(Path(__file__).resolve().parent/'faults'))
import hostile
from fisher_nodes import Merged, ModelReference, evaluate, linear_grams, mask_fisher, merge, merge_files, parameter_fisher, predict, run_recipe
from fisher_nodes.app.cli import main
from fisher_nodes.engine.fingerprints import hash_weights
from fisher_nodes.engine.models import adapter_origin, load_model, load_reference, load_tokenizer
from reference import examples, tiny
from test_bad_input import refuses

pytestmark = pytest.mark.filterwarnings('ignore')
ASK = r'is an adapter of PEFT; pass merge_adapters=True \(--merge-adapters\) to merge it into its base'
ROWS = Dataset.from_list(examples(6, 3))

def learned(wrapped, seed=1):
    "Numbers for everything that an adapter trains."
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad: p.copy_(torch.randn(p.shape, generator=gen)*.3)
    return wrapped.eval()

def save_adapter(base, folder, seed=1, num_labels=3, **lora):
    "An adapter of a base in a folder, as a training run leaves it."
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels, ignore_mismatched_sizes=True)
    config = dict(task_type='SEQ_CLS', r=4, lora_alpha=6, target_modules=['query', 'value'])
    wrapped = learned(get_peft_model(model, LoraConfig(**config | lora)), seed)
    wrapped.save_pretrained(folder)
    return wrapped

@pytest.fixture
def here(tmp_path, monkeypatch):
    "A base without a head, and two adapters of it: `a` of three classes, `b` of two."
    tiny(dtype=torch.float32).base_model.save_pretrained(tmp_path/'base')
    hostile.tokenizer().save_pretrained(tmp_path/'base')
    for t, n in dict(a=3, b=2).items(): save_adapter(tmp_path/'base', tmp_path/t, seed=n, num_labels=n)
    monkeypatch.chdir(tmp_path)
    return tmp_path

def by_peft(base, folder, num_labels):
    "What a user of `peft` does."
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    return PeftModel.from_pretrained(model, folder).merge_and_unload()

def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys()==b.keys()
    for n in a: assert_close(a[n], b[n], rtol=0, atol=0)

def change(folder, **kw):
    path = folder/'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | kw))

def change_tensors(folder, f):
    path = folder/'adapter_model.safetensors'
    save_file({k: v.contiguous() for k, v in f(load_file(path)).items()}, path)


# --- the sum --------------------------------------------------------------------------------

def delta(t, name, alpha, r, root=False):
    "α/r B A in float64, of the tensors of a file."
    a, b = (t[f'base_model.model.{name}.lora_{o}.weight'].double() for o in 'AB')
    return alpha/(math.sqrt(r) if root else r)*(b@a)

QUERY = 'bert.encoder.layer.{}.attention.self.query'
HAND = dict(
    plain=({}, lambda w, t, n: w+delta(t, n, 6, 4)),
    root=(dict(use_rslora=True), lambda w, t, n: w+delta(t, n, 6, 4, True)),
    patterns=(dict(rank_pattern={QUERY.format(0): 2}, alpha_pattern={'query': 3}), lambda w, t, n: w+delta(t, n, 3, 2 if '.0.' in n else 4)),
    expression=(dict(target_modules=r'.*\.(query|intermediate\.dense)'), lambda w, t, n: w+delta(t, n, 6, 4)),
    layers=(dict(layers_to_transform=[1]), lambda w, t, n: w+delta(t, n, 6, 4) if '.1.' in n else w),
    directions=(dict(use_dora=True), lambda w, t, n: (v := w+delta(t, n, 6, 4))*(t[f'base_model.model.{n}.lora_magnitude_vector'].double()/v.norm(dim=1))[:, None]))

@pytest.mark.parametrize('lora,formula', HAND.values(), ids=HAND)
def test_by_hand(lora, formula, here):
    "Every adapted matrix by its formula, in float64; all others are the base's."
    save_adapter(here/'base', here/'c', **lora)
    found, base, t = load_model(here/'c', merge_adapters=True), BertModel.from_pretrained(here/'base'), load_file(here/'c'/'adapter_model.safetensors')
    was = {f'bert.{n}': w for n, w in base.state_dict().items()}
    adapted = {n.removeprefix('base_model.model.').partition('.lora_')[0]+'.weight' for n in t if '.lora_' in n}
    assert len(adapted)==(2 if 'layers_to_transform' in lora else 4)
    for n, w in found.state_dict().items():
        if n.startswith('classifier'): want = t[f'base_model.model.{n}']
        elif n not in adapted or 'query' not in n: want = was[n] if n not in adapted else w
        else: want = formula(was[n].double(), t, n.removesuffix('.weight')).float()
        assert_close(w, want, rtol=2e-5, atol=1e-7 if n in adapted else 0)

MORE = dict(biases=dict(bias='lora_only'), every_bias=dict(bias='all'), words=dict(target_modules=['query', 'word_embeddings']), dense=dict(target_modules='all-linear', lora_bias=True), saved=dict(modules_to_save=['pooler']))

@pytest.mark.parametrize('lora', MORE.values(), ids=MORE)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_as_peft_does(lora, dtype, here):
    tiny(dtype=dtype).base_model.save_pretrained(here/'base')
    wrapped = save_adapter(here/'base', here/'c', **lora)
    found = load_model(here/'c', merge_adapters=True)
    same(found, by_peft(here/'base', here/'c', 3))
    assert found.dtype==dtype and type(found) is type(wrapped.get_base_model()) and not found.training and all(p.requires_grad for p in found.parameters())

def test_conv1d_and_decoders(here):
    "GPT-2's matrices lie the other way; a language model has no head of its own."
    torch.manual_seed(0)
    size = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, num_key_value_heads=2, pad_token_id=0)
    gpt = GPT2ForSequenceClassification(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=40, pad_token_id=0))
    llama, writer = LlamaForSequenceClassification(LlamaConfig(**size)), LlamaForCausalLM(LlamaConfig(**size))
    for model, kind, names in ((gpt, 'SEQ_CLS', ['c_attn']), (llama, 'SEQ_CLS', ['q_proj', 'down_proj']), (writer, 'CAUSAL_LM', ['q_proj', 'lm_head']), (writer, None, ['q_proj'])):
        name = f'{type(model).__name__}-{kind}'
        model.save_pretrained(here/f'base-{name}')
        auto = AutoModelForCausalLM if model is writer else AutoModelForSequenceClassification
        learned(get_peft_model(auto.from_pretrained(here/f'base-{name}'), LoraConfig(task_type=kind, r=2, target_modules=names))).save_pretrained(here/name)
        want = PeftModel.from_pretrained(auto.from_pretrained(here/f'base-{name}'), here/name).merge_and_unload()
        found = load_model(here/name, merge_adapters=True)
        same(found, want)
        assert type(found) is type(model) and hash_weights(found)!=hash_weights(model)


# --- the head -------------------------------------------------------------------------------

def test_the_head_survives(here):
    "Its size is the adapter's, its classes have the names that a configuration beside the adapter gives."
    before = torch.get_rng_state()
    for t, n in dict(a=3, b=2).items():
        found = load_model(here/t, merge_adapters=True)
        assert torch.equal(torch.get_rng_state(), before)
        same(found, by_peft(here/'base', here/t, n))
        torch.set_rng_state(before)
        assert found.config.num_labels==n and found.config.id2label=={i: f'LABEL_{i}' for i in range(n)}
    config = BertModel.from_pretrained(here/'base').config
    config.id2label, config.label2id = {0: 'no', 1: 'maybe', 2: 'yes'}, {'no': 0, 'maybe': 1, 'yes': 2}
    config.save_pretrained(here/'a')
    assert load_model(here/'a', merge_adapters=True).config.id2label==config.id2label

def test_a_base_with_a_head_of_its_own(here):
    "Of another size it is replaced; where the adapter brings none it stays."
    tiny(num_labels=5, dtype=torch.float32).save_pretrained(here/'base')
    assert load_model(here/'a', merge_adapters=True).config.num_labels==3
    base = AutoModelForSequenceClassification.from_pretrained(here/'base')
    learned(get_peft_model(base, LoraConfig(target_modules=['query']))).save_pretrained(here/'c')
    found = load_model(here/'c', merge_adapters=True)
    assert_close(found.classifier.weight, tiny(num_labels=5, dtype=torch.float32).classifier.weight, rtol=0, atol=0)

def test_nobody_brings_a_head(here):
    base = AutoModelForSequenceClassification.from_pretrained(here/'base')
    learned(get_peft_model(base, LoraConfig(target_modules=['query']))).save_pretrained(here/'c')
    with refuses('c is an adapter; its base: .*base has no weights for classifier.bias, classifier.weight, nor has the adapter'): load_model(here/'c', merge_adapters=True)


# --- models in memory -----------------------------------------------------------------------

def state_of(wrapped):
    "All that a caller could tell."
    bits = {n: t.detach().clone().view(torch.uint8) if t.ndim else t.clone() for n, t in wrapped.state_dict().items()}
    told = [(n, type(m), m.training, len(m._forward_hooks)+len(m._forward_pre_hooks)) for n, m in wrapped.named_modules()]
    return bits, told, {n: (id(p), p.requires_grad) for n, p in wrapped.named_parameters()}, list(wrapped.active_adapters), str(wrapped.peft_config), wrapped.config.to_dict(), torch.get_rng_state()

def unchanged(before, after):
    assert before[1:-1]==after[1:-1] and before[0].keys()==after[0].keys() and torch.equal(before[-1], after[-1])
    assert all(torch.equal(t, after[0][n]) for n, t in before[0].items())

def test_a_model_of_peft_comes_back_as_it_was(here):
    "Bit for bit and with its adapters, whatever is done with it; the result is that of its folder."
    wrapped = {t: save_adapter(here/'base', here/t, seed=i, num_labels=3) for i, t in enumerate('ab')}
    wrapped['b'].add_adapter('idle', LoraConfig(task_type='SEQ_CLS', target_modules=['key']))
    for o in wrapped.values(): o.train().get_submodule('base_model.model.bert.embeddings').eval()
    before = {t: state_of(o) for t, o in wrapped.items()}
    how = dict(progress=False, merge_adapters=True)
    fishers = {t: mask_fisher(o, ROWS, **how) for t, o in wrapped.items()}
    found = merge(wrapped, fishers, **how)
    logits = predict(wrapped['a'], ROWS, **how)
    for f in (parameter_fisher, linear_grams, evaluate): f(wrapped['a'], ROWS, **how)
    for t, o in wrapped.items(): unchanged(before[t], state_of(o))
    named = merge({t: here/t for t in 'ab'}, data=dict(a=ROWS, b=ROWS), **how)
    same(found.body, named.body)
    plain = {t: by_peft(here/'base', here/t, 3) for t in 'ab'}
    same(found.body, merge(plain, {t: mask_fisher(o, ROWS, progress=False) for t, o in plain.items()}, progress=False).body)
    assert_close(logits, torch.cat([plain['a'](input_ids=torch.tensor([o['input_ids']])).logits for o in ROWS]).detach(), rtol=1e-5, atol=0)
    assert found.report['tasks']['a']['adapter']['base']=='base' and found.recipe['models']['a']['model'] is None and adapter_origin(found['a']) is None

def test_only_active_adapters_of_lora(here):
    wrapped = save_adapter(here/'base', here/'c')
    wrapped.add_adapter('other', LoraConfig(task_type='SEQ_CLS', target_modules=['key']))
    one = load_model(wrapped, merge_adapters=True)
    same(one, by_peft(here/'base', here/'c', 3))
    wrapped.merge_adapter()
    same(load_model(wrapped, merge_adapters=True), one)
    ia3 = get_peft_model(AutoModelForSequenceClassification.from_pretrained(here/'base'), IA3Config(task_type='SEQ_CLS', target_modules=['key'], feedforward_modules=[]))
    with refuses("adapter 'default' is of kind 'IA3', and only LORA can be merged"): mask_fisher(ia3, ROWS, merge_adapters=True)
    wrapped.get_base_model().is_quantized = True
    with refuses("'a'", 'its base is quantised'): merge(dict(a=wrapped), method='average', merge_adapters=True)

def test_a_matrix_with_two_names(here):
    "What changes the output would change the word embeddings too."
    torch.manual_seed(0)
    tied = LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24, tie_word_embeddings=True))
    tied.save_pretrained(here/'tied')
    wrapped = learned(get_peft_model(tied, LoraConfig(task_type='CAUSAL_LM', target_modules=['lm_head'])))
    wrapped.save_pretrained(here/'c')
    change(here/'c', base_model_name_or_path='tied')
    says = 'embed_tokens.weight and base_model.model.lm_head.base_layer.weight are one matrix'
    with refuses(says): load_model(wrapped, merge_adapters=True)
    with refuses(says): load_model(here/'c', merge_adapters=True)


# --- where it is asked for ------------------------------------------------------------------

def test_nobody_asked(here):
    wrapped, rows = save_adapter(here/'base', here/'c'), Dataset.from_list(examples(4, 3))
    for f in (mask_fisher, parameter_fisher, linear_grams, evaluate, predict):
        with refuses(f'c {ASK}'): f(here/'c', rows)
        with refuses('PeftModelForSequenceClassification; it wraps a model, so give `model.merge_and_unload', 'merge_adapters=True'): f(wrapped, rows)
    for f in (merge, lambda o, **kw: merge_files(o, out=here/'new', **kw)):
        with refuses(f'a {ASK}'): f(dict(a=here/'a', b=here/'b'), method='average')
    with refuses("model of 'a'", 'merge_adapters=True'): merge(dict(a=wrapped), method='average')
    with refuses('is an adapter of PEFT; merge it into its model first'): merge(dict(a=here/'a'), method='task-arithmetic', base=here/'b', merge_adapters=True)
    with refuses('`merge_files` loads no model, so it merges no adapters; use `merge'): merge_files(dict(a=here/'a'), method='average', out=here/'new', merge_adapters=True)
    with refuses('`merge_adapters` (is|must be)'): merge(dict(a=here/'a'), method='average', merge_adapters='yes')
    assert not (here/'new').exists()

def test_beside_a_model(here):
    tiny(dtype=torch.float32).save_pretrained(here/'a')
    for asked in (False, True):
        with refuses('a has an adapter of PEFT beside model.safetensors; which is meant'): load_model(here/'a', asked)

def shell(line, capsys, status=0):
    assert main(line.split())==status
    out = capsys.readouterr()
    return out.out if not status else out.err.strip()

def test_from_a_shell(here, capsys):
    "Fishers, merges, scores; a recipe says it too, and repeats the bytes, also where nothing is measured."
    (here/'rows.csv').write_text('sentence,label\n'+'\n'.join(f'w{i} w{i+3},{i%2}' for i in range(8))+'\n')
    assert 'is an adapter of PEFT; give --merge-adapters to merge it into its base' in shell('merge a=a b=b --method average --out new', capsys, 2)
    shell('fisher b --data rows.csv --num-samples 4 --merge-adapters --out b.safetensors', capsys)
    shell('evaluate b --data rows.csv --merge-adapters', capsys)
    shell('merge a=a b=b --method average --merge-adapters --out one', capsys)
    shell('merge b=b c=b --fisher b=b.safetensors c=b.safetensors --merge-adapters --out two', capsys)
    shell('merge b=b c=b --data b=rows.csv c=rows.csv --num-samples 4 --merge-adapters --out three', capsys)
    for o in ('one', 'two', 'three'):
        assert 'merge_adapters: true' in (here/o/'recipe.yml').read_text()
        shell(f'merge {o}/recipe.yml --out again-{o}', capsys)
        assert (here/o/'model.safetensors').read_bytes()==(here/f'again-{o}'/'model.safetensors').read_bytes()
    assert '--merge-adapters is for the recipe to say' in shell('merge one/recipe.yml --merge-adapters --out new', capsys, 2)
    same(Merged.from_pretrained(here/'two').body, load_model(here/'b', merge_adapters=True).bert)
    assert Merged.from_pretrained(here/'one').tokenizer is not None
    text = (here/'one'/'recipe.yml').read_text().replace('merge_adapters: true\n', '')
    (here/'one'/'recipe.yml').write_text(text)
    with refuses(ASK): run_recipe(here/'one'/'recipe.yml', here/'new')


# --- which base -----------------------------------------------------------------------------

def test_the_base_is_named(here):
    "In a Fisher, in the report, in the card, where its licence counts; what a Fisher is bound to is the sum."
    (here/'base'/'README.md').write_text('---\nlicense: mit\n---\n')
    (here/'a'/'README.md').write_text('---\nlicense: apache-2.0\nbase_model: base\n---\n')
    fisher = mask_fisher(here/'a', ROWS, progress=False, merge_adapters=True)
    base = hash_weights(BertModel.from_pretrained(here/'base'))
    assert fisher.meta['adapter']==dict(base='base', weight_hash=base) and fisher.meta['model']=='a'
    assert fisher.meta['weight_hash']==hash_weights(by_peft(here/'base', here/'a', 3))!=base
    found = merge(dict(a=here/'a'), method='average', merge_adapters=True)
    said = found.report['tasks']['a']
    assert said['model']=='a' and said['card']['license']=='apache-2.0' and said['adapter']==dict(base='base', weight_hash=base, hub=False, revision=None, card=dict(license='mit'))
    found.save_pretrained(here/'out')
    card = (here/'out'/'README.md').read_text()
    assert 'The model of a is an adapter, merged into base.' in card and '| base of a | base | mit |' in card and 'license_name: differs-by-source' in card
    assert Merged.from_pretrained(here/'out').report['tasks']==found.report['tasks'] and str(here) not in card
    merged = load_model(here/'a', merge_adapters=True)
    merge(dict(a=merged), dict(a=fisher), merge_adapters=True)
    with refuses('measured on other weights'): merge(dict(a=here/'b'), dict(a=fisher), merge_adapters=True)
    with refuses("the body of 'a'.*is not what it was"): load_reference('a', ModelReference(str(here/'b'), weight_hash=fisher.meta['weight_hash']), True)

def test_the_base_is_not_written_over(here):
    found = merge(dict(a=here/'a'), method='average', merge_adapters=True)
    with refuses("in the model of 'the base of a', .*base; give another"): found.save_pretrained(here/'base', overwrite=True)

def test_a_tokenizer_of_its_own_comes_first(here):
    assert load_tokenizer(here/'a').get_vocab()==load_tokenizer(here/'base').get_vocab()
    own = hostile.tokenizer()
    own.add_tokens(['mine'])
    own.save_pretrained(here/'a')
    assert 'mine' in load_tokenizer(here/'a').get_vocab()
    shutil.rmtree(here/'base')
    assert 'mine' in load_tokenizer(here/'a').get_vocab()

def cached(cache, name, folder, ref='main', commit='a'*40):
    "Put a folder where the Hub's client keeps what it downloaded."
    repo = cache/f'models--{name.replace("/", "--")}'
    (repo/'refs'/ref).parent.mkdir(parents=True, exist_ok=True)
    (repo/'refs'/ref).write_text(commit)
    shutil.copytree(folder, repo/'snapshots'/commit)

@pytest.fixture
def hub(here, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(here/'cache'))
    return here/'cache'

def test_from_the_hub(here, hub):
    "Both by Hub id, and the base at the revision that the adapter names."
    cached(hub, 'user/base', here/'base', 'v2', 'b'*40)
    change(here/'a', base_model_name_or_path='user/base', revision='v2')
    cached(hub, 'user/lora', here/'a')
    with refuses(f'user/lora {ASK}'): load_model('user/lora', False)
    for given in ('user/lora', ModelReference('user/lora', 'main')):
        found = merge(dict(a=given), method='average', merge_adapters=True)
        same(found['a'], by_peft(here/'base', here/'a', 3))
        said = found.report['tasks']['a']
        assert (said['model'], said['revision'], said['hub'])==('user/lora', 'a'*40, True)
        assert [said['adapter'][k] for k in ('base', 'revision', 'hub')]==['user/base', 'b'*40, True] and found.tokenizer is not None
    with refuses('user/lora is an adapter of PEFT; merge it into its model first'): merge(dict(a='user/lora'), method='ties', base='user/lora', merge_adapters=True)
    shutil.rmtree(hub/'models--user--base')
    with refuses('user/lora is an adapter; its base: cannot load user/base at v2'): load_model('user/lora', True)


# --- what is refused ------------------------------------------------------------------------

FIRST = QUERY.format(0)
BAD = {
    'another kind': (dict(peft_type='IA3'), r"a cannot be merged into its base: it is of kind 'IA3', and only LORA can be"), 'no kind': (dict(peft_type=None), 'it is of kind None'),
    'rank': (dict(r=8), r'lora_A.weight has shape \[4, 16\], but its base means \[8, 16\]'), 'huge rank': (dict(r=10**9), 'its rank is 1000000000, but no tensor is larger than 16'),
    'zero rank': (dict(r=0), '`r` must be a finite number of at least 1, got 0'), 'huge rank of a layer': (dict(rank_pattern={'query': 10**9}), 'its rank is 1000000000'),
    'alpha': (dict(lora_alpha='6'), "`lora_alpha` must be a finite number, got '6'"), 'expression': (dict(alpha_pattern={'(x+)+y': 3}), 'alpha_pattern'),
    'no base': (dict(base_model_name_or_path=None), '`base_model_name_or_path` must be a word, got None'), 'base is nothing': (dict(base_model_name_or_path=''), 'a folder or Hub id'),
    'base is gone': (dict(base_model_name_or_path='nowhere'), 'a is an adapter; its base: cannot load nowhere'), 'base is an adapter': (dict(base_model_name_or_path='b'), 'a is an adapter; its base: .*b is an adapter of PEFT; merge it'),
    'no task': (dict(task_type=None), 'its base has no layer bert.encoder.layer.0'), 'odd task': (dict(task_type='SING'), "`task_type` is 'SING'; expected one of"),
    'odd class': (dict(task_type=None, auto_mapping=dict(base_model_class='pipeline')), 'does not say which model'), 'residual': (dict(init_lora_weights='pissa_niter_4'), "`init_lora_weights` is 'pissa_niter_4', which cannot be merged"),
    'code': (dict(megatron_config={'a': 1}, megatron_core='evil'), '`megatron_config` is'), 'of later': (dict(use_magic=True), '`use_magic` is True, which cannot be merged here'), 'stacked': (dict(layer_replication=[[0, 2]]), '`layer_replication`'),
    'parameters': (dict(target_parameters=['x']), '`target_parameters`'), 'a later default': (dict(use_magic=False), None), 'saved module that is not there': (dict(modules_to_save=['classifier', 'pooler']), 'adapter_model.safetensors has no base_model.model.bert.pooler.dense.weight')}

@pytest.mark.parametrize('kw,says', BAD.values(), ids=BAD)
def test_configurations(kw, says, here):
    change(here/'a', **kw)
    if says is None: return same(load_model(here/'a', merge_adapters=True), by_peft(here/'base', here/'a', 3))
    with refuses(says): load_model(here/'a', merge_adapters=True)
    with refuses(says): mask_fisher(here/'a', ROWS, merge_adapters=True)

TENSORS = {
    'another width': (lambda t: {k: v[:, :8] if 'lora_A' in k else v for k, v in t.items()}, r'lora_A.weight has shape \[4, 8\], but its base means \[4, 16\]'),
    'deeper': (lambda t: t | {k.replace('layer.1', 'layer.7'): v.clone() for k, v in t.items()}, 'its base has no layer bert.encoder.layer.7.attention.self.query'),
    'half': (lambda t: {k: v for k, v in t.items() if not (FIRST in k and 'lora_B' in k)}, f'adapter_model.safetensors has no base_model.model.{FIRST}.lora_B.weight'),
    'no head': (lambda t: {k: v for k, v in t.items() if 'classifier' not in k}, 'base has no weights for classifier.bias, classifier.weight, nor has the adapter'),
    'more': (lambda t: t | {'base_model.model.bert.other.weight': torch.ones(2)}, 'its base has no place for bert.other.weight'), 'other names': (lambda t: {'x': torch.ones(2)}, 'x does not begin with base_model.model.'),
    'nan': (lambda t: {k: v*float('nan') if 'lora_B' in k else v for k, v in t.items()}, 'lora_B.weight is not finite'), 'bytes': (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, 'is of type I8'),
    'empty': (lambda t: t | {'base_model.model.classifier.bias': torch.zeros(0)}, r'classifier.bias is empty: its shape is \[0\]'),
    'a bias of another head': (lambda t: t | {'base_model.model.classifier.bias': torch.zeros(10**6)}, r'classifier.bias has shape \[1000000\], but its weight has \[3, 16\]'),
    'nothing': (lambda t: {}, 'its rank is 4, but no tensor is larger than 0'), 'only a head': (lambda t: {k: v for k, v in t.items() if 'classifier' in k}, 'has no layer with an adapter')}

@pytest.mark.parametrize('f,says', TENSORS.values(), ids=TENSORS)
def test_tensors(f, says, here):
    change_tensors(here/'a', f)
    with refuses(says): load_model(here/'a', merge_adapters=True)

def test_another_base(here):
    "Wider, shallower, of another family, quantised, or with a pickle for weights."
    for model, says in ((tiny(hidden=32), r'has shape \[4, 16\], but its base means \[4, 32\]'), (tiny(layers=1), 'its base has no layer bert.encoder.layer.1'), (tiny('roberta'), 'has no weights for classifier.dense.bias|no layer')):
        shutil.rmtree(here/'base')
        model.float().base_model.save_pretrained(here/'base')
        with refuses(says): load_model(here/'a', merge_adapters=True)
    config = here/'base'/'config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(quantization_config=dict(quant_method='gptq', bits=4))))
    with refuses('a is an adapter; its base: .*the model is quantised'): load_model(here/'a', merge_adapters=True)
    (here/'base'/'model.safetensors').rename(here/'base'/'pytorch_model.bin')
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k!='quantization_config'}))
    with refuses('pytorch_model.bin is a pickle'): load_model(here/'a', merge_adapters=True)

def test_pickles_and_links(here):
    file = here/'a'/'adapter_model.safetensors'
    target = here/'b.safetensors'
    file.rename(target)
    with refuses('a cannot be merged into its base: adapter_model.safetensors is not there'): load_model(here/'a', merge_adapters=True)
    torch.save(load_file(target), here/'a'/'adapter_model.bin')
    with refuses('adapter_model.bin is a pickle, which can run code and is not read; adapter_model.safetensors is not there'): load_model(here/'a', merge_adapters=True)
    file.symlink_to(target)
    with refuses('is a link that leaves its folder'): load_model(here/'a', merge_adapters=True)

def test_no_library(here, monkeypatch):
    "The package, plain models and the refusals work without it; what needs it says how to install it."
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(ImportError, match=r'^adapters need the library `peft` \(.*\); pip install "fisher_nodes\[peft\]"$'): load_model(here/'a', merge_adapters=True)
    with refuses(ASK): load_model(here/'a', False)
    tiny(dtype=torch.float32).save_pretrained(here/'c')
    merge(dict(c=here/'c'), method='average', merge_adapters=True)
    code = "import sys; import fisher_nodes.app.cli, fisher_nodes.merging.run; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode==0

@pytest.mark.parametrize('key', ['base_model_name_or_path', 'r', 'lora_alpha', 'rank_pattern', 'alpha_pattern', 'modules_to_save', 'auto_mapping', 'task_type', 'revision', 'bias', 'target_modules', 'peft_type'])
def test_hostile_configurations(key, here):
    "Fine, or one line; nothing runs, nothing hangs."
    for value in hostile.VALUES:
        change(here/'a', **{key: value})
        try: load_model(here/'a', merge_adapters=True)
        except (ValueError, FileNotFoundError) as e: assert '\n' not in str(e) and len(str(e))<3000, (value, e)

def test_adapters_that_transformers_added(here):
    "They are refused in memory; what they are saved as is an adapter."
    model = AutoModelForSequenceClassification.from_pretrained(here/'base')
    with torch.no_grad(): model.classifier.weight.fill_(.5)
    model.save_pretrained(here/'whole')
    model = AutoModelForSequenceClassification.from_pretrained(here/'whole')
    try: model.add_adapter(LoraConfig(target_modules=['query']))
    except ValueError as e:
        if 'version of PEFT' not in str(e): raise
        pytest.skip(f'this transformers adds none with this peft: {e}')
    learned(model)
    with refuses("model of 'a' has adapters of PEFT", 'save it and give that folder'): merge(dict(a=model), method='average', merge_adapters=True)
    model.save_pretrained(here/'c')
    found = load_model(here/'c', merge_adapters=True)
    ids = torch.tensor([[4, 5, 6]])
    assert_close(found(ids).logits, model(ids).logits, rtol=1e-5, atol=0)
