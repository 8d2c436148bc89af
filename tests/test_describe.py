"""The row that numbers give is the row written by hand; families without a row get one that literal masks agree with."""
import pytest
from conftest import THIRD
import torch
import transformers
from torch.testing import assert_close
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fisher_nodes.core.describe import as_family, block_table, describe
from fisher_nodes.core.families import FAMILIES
from fisher_nodes.core.nodes import MaskGradients
from fisher_nodes.core.places import find_nodes, find_places
from fisher_nodes.core.prove import Case, _alone, literal_masks, make_twin, project, prove, random_inputs
from zoo import BART, BASE, GROUPED, IMAGE, SOUND, ZOO, build

transformers.logging.set_verbosity_error()

REFUSED = { # case -> what is said of it
    'deberta': 'pos_proj', 'deberta-c2p': 'pos_proj', 'deberta-absolute': 'no way to read it passes', 'deberta-talking': 'head_weights_proj',
    'deberta-v2': 'pos_key_proj', 'longformer': 'is the query cannot be told',
    'olmo2': 'a norm over all heads?', 'olmo3': 'a norm over all heads?',
    'mixtral': 'is part of no block', 'qwen3_moe': 'is part of no block', 'qwen3_moe-some': 'is part of no block', 'gpt_oss': 'is part of no block'}
MADE_UP = {'esm', 'mpnet'} # positions begin elsewhere with the padding word that the zoo gives them, or there are none

@pytest.mark.parametrize('name', THIRD(o for o in ZOO if o not in REFUSED))
def test_numbers_give_the_row_that_was_written_by_hand(name):
    model = build(name)
    hand, state = find_nodes(model), torch.get_rng_state()
    found = describe(model)
    assert not found.not_understood, found
    assert torch.equal(torch.get_rng_state(), state)
    with as_family(model, found.family): assert block_table(find_nodes(model))==block_table(hand)
    assert list(found.blocks)==[o.name for o in hand]
    if name not in MADE_UP: assert found.family.skips_padding==FAMILIES[model.config.model_type].skips_padding

@pytest.mark.parametrize('name', REFUSED)
def test_what_is_not_understood_is_named_and_its_row_refused(name, monkeypatch):
    model = build(name)
    found = describe(model)
    assert found.not_understood and REFUSED[name] in repr(found)
    monkeypatch.setitem(FAMILIES, model.config.model_type, found.family)
    with pytest.raises(ValueError): find_places(model)

def test_a_model_without_heads_has_no_attention():
    found = describe(make('fnet', BASE))
    assert {k for o in found.blocks.values() for k in o}=={'row'}

def make(kind, options, auto='AutoModel'):
    if kind not in CONFIG_MAPPING: pytest.skip(f'transformers {transformers.__version__} has no {kind!r}')
    torch.manual_seed(0)
    return getattr(transformers, auto).from_config(CONFIG_MAPPING[kind](**options)).eval()

def test_attention_that_calls_none_of_its_matrices_is_named():
    found = describe(make('wavlm', SOUND))
    assert 'q_proj and out_proj: its forward is never called' in repr(found)

HELD_OUT = {
    'arcee': ('arcee', BASE | GROUPED), 'biogpt': ('biogpt', BASE), 'layoutlm': ('layoutlm', BASE | dict(max_2d_position_embeddings=1024)),
    'roformer': ('roformer', BASE), 'persimmon': ('persimmon', BASE), 'olmo': ('olmo', BASE | GROUPED),
    'dinov2_with_registers': ('dinov2_with_registers', IMAGE | dict(mlp_ratio=2)), 'megatron-bert': ('megatron-bert', BASE),
    'helium': ('helium', BASE | GROUPED | dict(head_dim=4)), 'ijepa': ('ijepa', IMAGE), 'cohere2': ('cohere2', BASE | GROUPED),
    'glm': ('glm', BASE | GROUPED | dict(head_dim=4)), 'exaone4': ('exaone4', BASE | GROUPED), 'apertus': ('apertus', BASE | GROUPED),
    'ernie4_5': ('ernie4_5', BASE | GROUPED), 'seed_oss': ('seed_oss', BASE | GROUPED | dict(head_dim=4)),
    'plbart': ('plbart', BART), 'blenderbot': ('blenderbot', BART), 'bigbird_pegasus': ('bigbird_pegasus', BART | dict(attention_type='original_full')),
    'xlm': ('xlm', dict(vocab_size=60, emb_dim=16, n_layers=2, n_heads=4, max_position_embeddings=40)),
    'flaubert': ('flaubert', dict(vocab_size=60, emb_dim=16, n_layers=2, n_heads=4, max_position_embeddings=40)),
    'imagegpt': ('imagegpt', dict(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=40)),
    'data2vec-vision': ('data2vec-vision', IMAGE | dict(use_relative_position_bias=True)), 'data2vec-audio': ('data2vec-audio', SOUND),
    'unispeech': ('unispeech', SOUND), 'vit_msn': ('vit_msn', IMAGE), 'splinter': ('splinter', BASE), 'markuplm': ('markuplm', BASE),
    'visual_bert': ('visual_bert', BASE | dict(visual_embedding_dim=8)), 'tapas': ('tapas', BASE)}

@pytest.mark.parametrize('name', THIRD(HELD_OUT))
def test_a_family_without_a_row_gets_one_that_literal_masks_agree_with(name, monkeypatch):
    kind, options = HELD_OUT[name]
    assert kind not in FAMILIES
    model = make(kind, options)
    found = describe(model)
    assert not found.not_understood, found
    monkeypatch.setitem(FAMILIES, kind, found.family)
    assert prove(model, halves=8, progress=False).nodes.keys()=={k for o in found.blocks.values() for k in o}
    check_literal_masks(model)

def check_literal_masks(model):
    "Every example's gradients, of a batch through hooks and of one alone with masks multiplied in."
    case = Case(make_twin(model), random_inputs(make_twin(model).base_model))
    with MaskGradients(case.model) as masks:
        masks.per_example(case.losses())
        batch = list(masks.grads)
    for i in range(case.n):
        one = _alone(case.inputs, i)
        with literal_masks(case.blocks, 'before') as ones:
            loss = project(case.run(one), one.get('attention_mask'), 1).sum()
            for g, want in zip(batch, torch.autograd.grad(loss, ones)): assert_close(g[i], want, rtol=1e-9, atol=1e-12)

def test_the_model_stays_as_it_was():
    model = make('arcee', BASE | GROUPED).train()
    state, keys = {k: o.clone() for k, o in model.state_dict().items()}, set(FAMILIES)
    describe(model, twin=False)
    assert model.training and model.dtype==torch.float32 and model.config.model_type=='arcee' and set(FAMILIES)==keys
    assert all(o.requires_grad for o in model.parameters()) and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
