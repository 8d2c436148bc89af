"""One tiny model of every family in the table, and of every layout that differs within one.

Nothing here imports the package. A line is a case: name -> model_type, options of its config, inputs if they
are not text, class if it is not `AutoModel`."""
import inspect

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CLASSIFIER = 'AutoModelForSequenceClassification'
BASE = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
    max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = dict(num_key_value_heads=2)
WIDE = dict(num_key_value_heads=2, head_dim=6) # heads together wider than the hidden states
GPT2 = dict(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=40, bos_token_id=1,
    eos_token_id=2)
T5 = dict(vocab_size=60, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4,
    relative_attention_num_buckets=8, relative_attention_max_distance=20)
BART = dict(vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=20, max_position_embeddings=40,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2)
IMAGE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=12,
    patch_size=4)
SWIN = dict(image_size=16, patch_size=2, embed_dim=8, depths=[2,2], num_heads=[2,4], window_size=4,
    mlp_ratio=2.)
TEXT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=60,
    max_position_embeddings=12, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TOWERS = dict(text_config=TEXT, vision_config=IMAGE | dict(num_hidden_layers=1, num_attention_heads=2),
    projection_dim=8)
SOUND = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
    conv_dim=[8,8], conv_stride=[2,2], conv_kernel=[3,3], num_feat_extract_layers=2,
    feat_extract_norm='layer', num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
MIXTURE = BASE | GROUPED | dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=10, decoder_sparse_step=1, experts_implementation='eager')

BOTH = ['c2p','p2c'] # DeBERTa's products with positions

ZOO = {
    # encoders
    'bert': ('bert', BASE),
    'bert-classifier': ('bert', BASE, 'text', CLASSIFIER),
    'bert-masked-lm': ('bert', BASE, 'text', 'AutoModelForMaskedLM'),
    'bert-choices': ('bert', BASE, 'choices', 'AutoModelForMultipleChoice'),
    'electra': ('electra', BASE | dict(embedding_size=8)),
    'ernie': ('ernie', BASE),
    'rembert': ('rembert', BASE | dict(input_embedding_size=8, output_embedding_size=8)),
    'roberta': ('roberta', BASE),
    'roberta-classifier': ('roberta', BASE, 'text', CLASSIFIER),
    'xlm-roberta': ('xlm-roberta', BASE),
    'camembert': ('camembert', BASE),
    'xlm-roberta-xl': ('xlm-roberta-xl', BASE),
    'roberta-prelayernorm': ('roberta-prelayernorm', BASE),
    'data2vec-text': ('data2vec-text', BASE),
    'layoutlmv3': ('layoutlmv3', BASE | dict(visual_embed=False, coordinate_size=2, shape_size=4,
        max_2d_position_embeddings=8)),
    'esm': ('esm', BASE | dict(position_embedding_type='rotary', mask_token_id=3)),
    'esm-absolute': ('esm', BASE | dict(position_embedding_type='absolute', mask_token_id=3)),
    'big_bird': ('big_bird', BASE | dict(attention_type='original_full')),
    'distilbert': ('distilbert', dict(vocab_size=60, dim=16, n_layers=2, n_heads=4, hidden_dim=24,
        max_position_embeddings=40)),
    'mpnet': ('mpnet', BASE),
    'albert': ('albert', BASE | dict(embedding_size=8, num_hidden_layers=3)),
    'albert-groups': ('albert', BASE | dict(embedding_size=8, num_hidden_layers=4, num_hidden_groups=2,
        inner_group_num=2)),
    'deberta': ('deberta', BASE | dict(relative_attention=True, pos_att_type=BOTH)),
    'deberta-c2p': ('deberta', BASE | dict(relative_attention=True, pos_att_type=['c2p'])),
    'deberta-absolute': ('deberta', BASE | dict(relative_attention=False)),
    'deberta-talking': ('deberta', BASE | dict(relative_attention=True, pos_att_type=BOTH,
        talking_head=True)),
    'deberta-v2': ('deberta-v2', BASE | dict(relative_attention=True, pos_att_type=BOTH)),
    'deberta-v3': ('deberta-v2', BASE | dict(relative_attention=True, pos_att_type=BOTH, share_att_key=True,
        position_buckets=8, norm_rel_ebd='layer_norm', position_biased_input=False)),
    'deberta-v2-absolute': ('deberta-v2', BASE | dict(relative_attention=False)),
    'deberta-v2-conv': ('deberta-v2', BASE | dict(relative_attention=True, pos_att_type=BOTH,
        share_att_key=True, position_buckets=8, conv_kernel_size=3, conv_act='gelu')),
    'longformer': ('longformer', BASE | dict(attention_window=4), 'global'),
    'modernbert': ('modernbert', BASE | dict(num_hidden_layers=3, cls_token_id=1, sep_token_id=2,
        local_attention=8, global_attn_every_n_layers=2, reference_compile=False)),
    'modernbert-biases': ('modernbert', BASE | dict(cls_token_id=1, sep_token_id=2, attention_bias=True,
        mlp_bias=True, norm_bias=True, reference_compile=False)),
    'modernbert-classifier': ('modernbert', BASE | dict(cls_token_id=1, sep_token_id=2,
        reference_compile=False), 'text', CLASSIFIER),
    # decoders
    'llama': ('llama', BASE),
    'llama-grouped': ('llama', BASE | GROUPED),
    'llama-one-key': ('llama', BASE | dict(num_key_value_heads=1)),
    'llama-biases': ('llama', BASE | GROUPED | dict(attention_bias=True, mlp_bias=True)),
    'llama-classifier': ('llama', BASE | GROUPED, 'text', CLASSIFIER),
    'llama-writer': ('llama', BASE | GROUPED, 'text', 'AutoModelForCausalLM'),
    'llama-tied': ('llama', BASE | GROUPED | dict(tie_word_embeddings=True), 'text', 'AutoModelForCausalLM'),
    'mistral': ('mistral', BASE | GROUPED | dict(sliding_window=5)),
    'qwen2': ('qwen2', BASE | GROUPED),
    'qwen3': ('qwen3', BASE | WIDE),
    'gemma': ('gemma', BASE | WIDE, 'text', 'AutoModelForCausalLM'),
    'gemma2': ('gemma2', BASE | WIDE | dict(sliding_window=5, query_pre_attn_scalar=6)),
    'gemma3_text': ('gemma3_text', BASE | WIDE | dict(sliding_window=5, query_pre_attn_scalar=6)),
    'smollm3': ('smollm3', BASE | GROUPED),
    'granite': ('granite', BASE | GROUPED),
    'cohere': ('cohere', BASE | GROUPED),
    'cohere-norms': ('cohere', BASE | GROUPED | dict(use_qk_norm=True)),
    'stablelm': ('stablelm', BASE | GROUPED),
    'stablelm-norms': ('stablelm', BASE | GROUPED | dict(qk_layernorm=True, use_qkv_bias=True,
        use_parallel_residual=True)),
    'nomic_bert': ('nomic_bert', BASE),
    'gte': ('gte', BASE),
    'eurobert': ('eurobert', BASE | GROUPED),
    'olmo2': ('olmo2', BASE | GROUPED),
    'olmo3': ('olmo3', BASE | GROUPED | dict(sliding_window=5)),
    'jina_embeddings_v3': ('jina_embeddings_v3', BASE),
    'phi': ('phi', BASE | GROUPED),
    'phi-norms': ('phi', BASE | dict(qk_layernorm=True)),
    'starcoder2': ('starcoder2', BASE | GROUPED),
    'starcoder2-plain': ('starcoder2', BASE | GROUPED | dict(use_bias=False)),
    'phi3': ('phi3', BASE),
    'phi3-grouped': ('phi3', BASE | GROUPED),
    'gpt2': ('gpt2', GPT2),
    'gpt2-writer': ('gpt2', GPT2, 'text', 'AutoModelForCausalLM'),
    'gpt_bigcode': ('gpt_bigcode', GPT2 | dict(multi_query=True)),
    'gpt_bigcode-heads': ('gpt_bigcode', GPT2 | dict(multi_query=False)),
    'gpt_neo': ('gpt_neo', dict(vocab_size=60, hidden_size=16, num_layers=2, num_heads=4,
        intermediate_size=24, attention_types=[[['global','local'],1]], window_size=4,
        max_position_embeddings=40, bos_token_id=1,
        eos_token_id=2)),
    'gptj': ('gptj', GPT2 | dict(rotary_dim=2)),
    'gpt_neox': ('gpt_neox', BASE),
    'gpt_neox-sequential': ('gpt_neox', BASE | dict(use_parallel_residual=False, attention_bias=False)),
    'opt': ('opt', BASE | dict(ffn_dim=24, word_embed_proj_dim=8)),
    'opt-post-norm': ('opt', BASE | dict(ffn_dim=24, word_embed_proj_dim=16, do_layer_norm_before=False,
        enable_bias=False)),
    'bloom': ('bloom', dict(vocab_size=60, hidden_size=16, n_layer=2, n_head=4)),
    'falcon': ('falcon', BASE | dict(new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=24)),
    'falcon-heads': ('falcon', BASE | dict(multi_query=False, bias=True, alibi=True, parallel_attn=False)),
    'falcon-one-key': ('falcon', BASE | dict(multi_query=True)),
    # encoder-decoders
    't5': ('t5', T5, 'pair'),
    't5-gated': ('t5', T5 | dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False), 'pair',
        'AutoModelForSeq2SeqLM'),
    't5-writer': ('t5', T5, 'pair', 'AutoModelForSeq2SeqLM'),
    't5-classifier': ('t5', T5 | dict(decoder_start_token_id=0), 'ends', CLASSIFIER),
    'mt5': ('mt5', T5 | dict(feed_forward_proj='gated-gelu'), 'pair'),
    'umt5': ('umt5', T5 | dict(feed_forward_proj='gated-gelu'), 'pair'),
    'bart': ('bart', BART, 'pair'),
    'bart-writer': ('bart', BART, 'pair', 'AutoModelForSeq2SeqLM'),
    'bart-classifier': ('bart', BART, 'ends', CLASSIFIER),
    'mbart': ('mbart', BART, 'pair'),
    'marian': ('marian', BART | dict(decoder_vocab_size=60), 'pair'),
    'pegasus': ('pegasus', BART, 'pair'),
    'm2m_100': ('m2m_100', BART, 'pair'),
    'whisper': ('whisper', BART | dict(num_mel_bins=6, max_source_positions=5, max_target_positions=20,
        suppress_tokens=None, begin_suppress_tokens=None), 'spoken'),
    # images and sound
    'vit': ('vit', IMAGE, 'image'),
    'vit-plain': ('vit', IMAGE | dict(qkv_bias=False), 'image'),
    'vit-classifier': ('vit', IMAGE, 'image', 'AutoModelForImageClassification'),
    'deit': ('deit', IMAGE, 'image'),
    'beit': ('beit', IMAGE | dict(use_relative_position_bias=True, vocab_size=20), 'image'),
    'beit-shared': ('beit', IMAGE | dict(use_shared_relative_position_bias=True, vocab_size=20), 'image'),
    'dinov2': ('dinov2', IMAGE | dict(mlp_ratio=2), 'image'),
    'dinov2-gated': ('dinov2', IMAGE | dict(mlp_ratio=2, use_swiglu_ffn=True), 'image'),
    'dinov3_vit': ('dinov3_vit', IMAGE, 'image'),
    'dinov3_vit-gated': ('dinov3_vit', IMAGE | dict(use_gated_mlp=True, num_register_tokens=2), 'image'),
    'swin': ('swin', SWIN, 'image'),
    'clip': ('clip', TOWERS, 'both'),
    'clip_text_model': ('clip_text_model', TEXT),
    'clip_vision_model': ('clip_vision_model', IMAGE, 'image', 'CLIPVisionModel'),
    'siglip': ('siglip', TOWERS, 'both'),
    'siglip_text_model': ('siglip_text_model', TEXT, 'whole', 'SiglipTextModel'),
    'siglip_vision_model': ('siglip_vision_model', IMAGE, 'image', 'SiglipVisionModel'),
    'audio-spectrogram-transformer': ('audio-spectrogram-transformer', dict(hidden_size=16,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, patch_size=4, frequency_stride=2,
        time_stride=3,
        max_length=13, num_mel_bins=8), 'spectrum'),
    'wav2vec2': ('wav2vec2', SOUND, 'sound'),
    'wav2vec2-pre-norm': ('wav2vec2', SOUND | dict(do_stable_layer_norm=True), 'sound'),
    'hubert': ('hubert', SOUND, 'sound'),
    # experts
    'mixtral': ('mixtral', MIXTURE),
    'qwen3_moe': ('qwen3_moe', MIXTURE),
    'qwen3_moe-some': ('qwen3_moe', MIXTURE | dict(mlp_only_layers=[0])),
    'gpt_oss': ('gpt_oss', MIXTURE | dict(head_dim=4, sliding_window=5)),
}
LENGTHS = (7, 3, 5) # with a window of 5, padding sees a word: eager attention in float64 is NaN otherwise
VOCAB = 19 # ids that every model has


def case(name):
    "model_type, options, inputs, class."
    return (*ZOO[name], *('text','AutoModel')[len(ZOO[name])-2:])

def build(name, seed=0, std=.2):
    "The model of a case, float64, every weight and bias random; skipped if transformers has no such family."
    kind, options, _, auto = case(name)
    if kind not in CONFIG_MAPPING: pytest.skip(f'transformers {transformers.__version__} has no {kind!r}')
    config = CONFIG_MAPPING[kind](**options)
    config._attn_implementation = 'eager'
    cls = getattr(transformers, auto)
    torch.manual_seed(seed)
    model = (cls.from_config if auto.startswith('Auto') else cls)(config)
    if kind=='swin' and not hasattr(model.encoder.layers[0].blocks[0].attention, 'q_proj'):
        pytest.skip(f'transformers {transformers.__version__} names the modules of swin otherwise; they are refused by name')
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for k, p in model.named_parameters():
            norm = p.ndim==1 and 'norm' in k.lower() and 'weight' in k
            p.copy_(torch.randn(p.shape, generator=gen)*std + norm)
    return model.double().eval()


# --- inputs ---------------------------------------------------------------------------------

def _ids(n, lengths, gen, end=None):
    rows = [torch.randint(4, VOCAB, (lengths[i%len(lengths)],), generator=gen) for i in range(n)]
    if end is not None:
        for r in rows: r[-1] = end
    return rows

def _images(n, gen, shape): return list(torch.randn((n, *shape), generator=gen, dtype=torch.float64))

def examples(name, n=3, seed=1):
    "`n` examples of unequal length, each a dictionary of tensors without a batch axis."
    kind, gen = case(name)[2], torch.Generator().manual_seed(seed)
    size = ZOO[name][1].get('image_size') or 12
    def text(lengths=LENGTHS, **more): return _ids(n, lengths, gen, **more)
    parts = {
        'text': lambda: dict(input_ids=text()),
        'choices': lambda: dict(input_ids=[torch.stack([o, o.flip(0)]) for o in text()]),
        'whole': lambda: dict(input_ids=text((12,))),
        'global': lambda: dict(input_ids=text((9,4,6))),
        'pair': lambda: dict(input_ids=text(), decoder_input_ids=text((4,6,2))),
        'ends': lambda: dict(input_ids=text(end=1 if 't5' in name else 2)), # the head reads the last end
        'spoken': lambda: dict(input_features=_images(n, gen, (6,10)), decoder_input_ids=text((4,6,2))),
        'image': lambda: dict(pixel_values=_images(n, gen, (3,size,size))),
        'both': lambda: dict(input_ids=text((12,), end=2), pixel_values=_images(n, gen, (3,12,12))),
        'spectrum': lambda: dict(input_values=_images(n, gen, (13,8))),
        'sound': lambda: dict(input_values=[torch.randn(t, generator=gen, dtype=torch.float64)
                                            for t in [(60,31,44)[i%3] for i in range(n)]])}[kind]()
    rows = [dict(zip(parts, o)) for o in zip(*parts.values())]
    if kind=='global':
        for r in rows: r['global_attention_mask'] = torch.tensor([1]+[0]*(len(r['input_ids'])-1))
    return rows

MASKS = dict(input_ids='attention_mask', input_values='attention_mask',
    decoder_input_ids='decoder_attention_mask')

def padded(tensors):
    "One tensor, zeros behind the words or samples of each, and where these are; pixels are of one size."
    width = max(t.shape[-1] for t in tensors)
    def wide(t): return torch.nn.functional.pad(t, (0, width-t.shape[-1]))
    return torch.stack([wide(t) for t in tensors]), torch.stack([wide(torch.ones_like(t)) for t in tensors]).long()

def collate(rows):
    "One padded batch."
    batch = {}
    for k in rows[0]:
        batch[k], there = padded([o[k] for o in rows])
        spectrum = k == 'input_values' and rows[0][k].ndim == 2 # these have one size
        if k in MASKS and not spectrum: batch[MASKS[k]] = there
    return batch

def alone(rows, i): return collate(rows[i:i+1])


# --- a loss for each example ----------------------------------------------------------------

def _projection(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def spread(x, seed, mask=None):
    "A fixed random projection of every example's numbers, those of padding left out."
    if x.ndim==2: return (x*_projection(x.shape[1:], seed)).sum(1)
    tokens = _projection((64, *x.shape[2:]), seed)[:x.shape[1]]
    if mask is not None: tokens = tokens*mask.reshape(*mask.shape, *[1]*(x.ndim-2))
    return (x*tokens).flatten(1).sum(1)

def _real(model, batch, x):
    "Which of the outputs are not padding."
    if 'decoder_attention_mask' in batch: return batch['decoder_attention_mask']
    mask = batch.get('attention_mask')
    if mask is None or x.ndim!=3: return None
    if 'input_values' in batch:
        lengths = model._get_feat_extract_output_lengths(mask.sum(1))
        return (torch.arange(x.shape[1])<lengths[:,None]).long()
    return mask

def losses(model, batch):
    "One number an example, of what the model gives out."
    accepted = inspect.signature(model.forward).parameters
    out = model(**{k: v for k, v in batch.items() if k in accepted}, return_dict=True)
    if 'image_embeds' in out: return spread(out['text_embeds'], 2) + spread(out['image_embeds'], 3)
    x = next(o for o in out.values() if torch.is_tensor(o) and o.is_floating_point())
    return spread(x, 2, _real(model, batch, x))
