"""One tiny model of every family in the table, and of every layout that differs within one.

Nothing here imports the package. A line is a case: name -> model_type, options of its config, class, inputs."""
import inspect

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

BASE = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
            max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = dict(num_key_value_heads=2)
WIDE = dict(num_key_value_heads=2, head_dim=6) # heads together wider than the hidden states
GPT2 = dict(vocab_size=60, n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=40, bos_token_id=1, eos_token_id=2)
T5 = dict(vocab_size=60, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4,
          relative_attention_num_buckets=8, relative_attention_max_distance=20)
BART = dict(vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=20, max_position_embeddings=40,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2)
IMAGE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=12, patch_size=4)
SWIN = dict(image_size=16, patch_size=2, embed_dim=8, depths=[2,2], num_heads=[2,4], window_size=4, mlp_ratio=2.)
TEXT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=60,
            max_position_embeddings=12, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TOWERS = dict(text_config=TEXT, vision_config=IMAGE | dict(num_hidden_layers=1, num_attention_heads=2), projection_dim=8)
SOUND = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
             conv_dim=[8,8], conv_stride=[2,2], conv_kernel=[3,3], num_feat_extract_layers=2, feat_extract_norm='layer',
             num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
MIXTURE = BASE | GROUPED | dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=10,
                                decoder_sparse_step=1, experts_implementation='eager')

ZOO = {
    # encoders
    'bert': ('bert', BASE, 'AutoModel', 'text'),
    'bert-classifier': ('bert', BASE, 'AutoModelForSequenceClassification', 'text'),
    'bert-masked-lm': ('bert', BASE, 'AutoModelForMaskedLM', 'text'),
    'electra': ('electra', BASE | dict(embedding_size=8), 'AutoModel', 'text'),
    'ernie': ('ernie', BASE, 'AutoModel', 'text'),
    'rembert': ('rembert', BASE | dict(input_embedding_size=8, output_embedding_size=8), 'AutoModel', 'text'),
    'roberta': ('roberta', BASE, 'AutoModel', 'text'),
    'roberta-classifier': ('roberta', BASE, 'AutoModelForSequenceClassification', 'text'),
    'xlm-roberta': ('xlm-roberta', BASE, 'AutoModel', 'text'),
    'camembert': ('camembert', BASE, 'AutoModel', 'text'),
    'xlm-roberta-xl': ('xlm-roberta-xl', BASE, 'AutoModel', 'text'),
    'roberta-prelayernorm': ('roberta-prelayernorm', BASE, 'AutoModel', 'text'),
    'data2vec-text': ('data2vec-text', BASE, 'AutoModel', 'text'),
    'layoutlmv3': ('layoutlmv3', BASE | dict(visual_embed=False, coordinate_size=2, shape_size=4,
                                             max_2d_position_embeddings=8), 'AutoModel', 'text'),
    'esm': ('esm', BASE | dict(position_embedding_type='rotary', mask_token_id=3), 'AutoModel', 'text'),
    'esm-absolute': ('esm', BASE | dict(position_embedding_type='absolute', mask_token_id=3), 'AutoModel', 'text'),
    'big_bird': ('big_bird', BASE | dict(attention_type='original_full'), 'AutoModel', 'text'),
    'distilbert': ('distilbert', dict(vocab_size=60, dim=16, n_layers=2, n_heads=4, hidden_dim=24,
                                      max_position_embeddings=40), 'AutoModel', 'text'),
    'mpnet': ('mpnet', BASE, 'AutoModel', 'text'),
    'albert': ('albert', BASE | dict(embedding_size=8, num_hidden_layers=3), 'AutoModel', 'text'),
    'albert-groups': ('albert', BASE | dict(embedding_size=8, num_hidden_layers=4, num_hidden_groups=2,
                                            inner_group_num=2), 'AutoModel', 'text'),
    'deberta': ('deberta', BASE | dict(relative_attention=True, pos_att_type=['c2p','p2c']), 'AutoModel', 'text'),
    'deberta-c2p': ('deberta', BASE | dict(relative_attention=True, pos_att_type=['c2p']), 'AutoModel', 'text'),
    'deberta-absolute': ('deberta', BASE | dict(relative_attention=False), 'AutoModel', 'text'),
    'deberta-talking': ('deberta', BASE | dict(relative_attention=True, pos_att_type=['c2p','p2c'], talking_head=True),
                        'AutoModel', 'text'),
    'deberta-v2': ('deberta-v2', BASE | dict(relative_attention=True, pos_att_type=['c2p','p2c']), 'AutoModel', 'text'),
    'deberta-v3': ('deberta-v2', BASE | dict(relative_attention=True, pos_att_type=['c2p','p2c'], share_att_key=True,
                   position_buckets=8, norm_rel_ebd='layer_norm', position_biased_input=False), 'AutoModel', 'text'),
    'deberta-v2-absolute': ('deberta-v2', BASE | dict(relative_attention=False), 'AutoModel', 'text'),
    'deberta-v2-conv': ('deberta-v2', BASE | dict(relative_attention=True, pos_att_type=['c2p','p2c'], share_att_key=True,
                        position_buckets=8, conv_kernel_size=3, conv_act='gelu'), 'AutoModel', 'text'),
    'longformer': ('longformer', BASE | dict(attention_window=4), 'AutoModel', 'global'),
    'modernbert': ('modernbert', BASE | dict(num_hidden_layers=3, cls_token_id=1, sep_token_id=2, local_attention=4,
                   global_attn_every_n_layers=2, reference_compile=False), 'AutoModel', 'text'),
    'modernbert-biases': ('modernbert', BASE | dict(cls_token_id=1, sep_token_id=2, attention_bias=True, mlp_bias=True,
                          norm_bias=True, reference_compile=False), 'AutoModel', 'text'),
    'modernbert-classifier': ('modernbert', BASE | dict(cls_token_id=1, sep_token_id=2, reference_compile=False),
                              'AutoModelForSequenceClassification', 'text'),
    # decoders
    'llama': ('llama', BASE, 'AutoModel', 'text'),
    'llama-grouped': ('llama', BASE | GROUPED, 'AutoModel', 'text'),
    'llama-one-key': ('llama', BASE | dict(num_key_value_heads=1), 'AutoModel', 'text'),
    'llama-biases': ('llama', BASE | GROUPED | dict(attention_bias=True, mlp_bias=True), 'AutoModel', 'text'),
    'llama-classifier': ('llama', BASE | GROUPED, 'AutoModelForSequenceClassification', 'text'),
    'llama-writer': ('llama', BASE | GROUPED, 'AutoModelForCausalLM', 'text'),
    'llama-tied': ('llama', BASE | GROUPED | dict(tie_word_embeddings=True), 'AutoModelForCausalLM', 'text'),
    'mistral': ('mistral', BASE | GROUPED | dict(sliding_window=4), 'AutoModel', 'text'),
    'qwen2': ('qwen2', BASE | GROUPED, 'AutoModel', 'text'),
    'qwen3': ('qwen3', BASE | WIDE, 'AutoModel', 'text'),
    'gemma': ('gemma', BASE | WIDE, 'AutoModelForCausalLM', 'text'),
    'gemma2': ('gemma2', BASE | WIDE | dict(sliding_window=4, query_pre_attn_scalar=6), 'AutoModel', 'text'),
    'gemma3_text': ('gemma3_text', BASE | WIDE | dict(sliding_window=4, query_pre_attn_scalar=6), 'AutoModel', 'text'),
    'smollm3': ('smollm3', BASE | GROUPED, 'AutoModel', 'text'),
    'granite': ('granite', BASE | GROUPED, 'AutoModel', 'text'),
    'cohere': ('cohere', BASE | GROUPED, 'AutoModel', 'text'),
    'cohere-norms': ('cohere', BASE | GROUPED | dict(use_qk_norm=True), 'AutoModel', 'text'),
    'stablelm': ('stablelm', BASE | GROUPED, 'AutoModel', 'text'),
    'stablelm-norms': ('stablelm', BASE | GROUPED | dict(qk_layernorm=True, use_qkv_bias=True,
                       use_parallel_residual=True), 'AutoModel', 'text'),
    'nomic_bert': ('nomic_bert', BASE, 'AutoModel', 'text'),
    'gte': ('gte', BASE, 'AutoModel', 'text'),
    'eurobert': ('eurobert', BASE | GROUPED, 'AutoModel', 'text'),
    'olmo2': ('olmo2', BASE | GROUPED, 'AutoModel', 'text'),
    'olmo3': ('olmo3', BASE | GROUPED | dict(sliding_window=4), 'AutoModel', 'text'),
    'jina_embeddings_v3': ('jina_embeddings_v3', BASE, 'AutoModel', 'text'),
    'phi': ('phi', BASE | GROUPED, 'AutoModel', 'text'),
    'phi-norms': ('phi', BASE | dict(qk_layernorm=True), 'AutoModel', 'text'),
    'starcoder2': ('starcoder2', BASE | GROUPED, 'AutoModel', 'text'),
    'starcoder2-plain': ('starcoder2', BASE | GROUPED | dict(use_bias=False), 'AutoModel', 'text'),
    'phi3': ('phi3', BASE, 'AutoModel', 'text'),
    'phi3-grouped': ('phi3', BASE | GROUPED, 'AutoModel', 'text'),
    'gpt2': ('gpt2', GPT2, 'AutoModel', 'text'),
    'gpt2-writer': ('gpt2', GPT2, 'AutoModelForCausalLM', 'text'),
    'gpt_bigcode': ('gpt_bigcode', GPT2 | dict(multi_query=True), 'AutoModel', 'text'),
    'gpt_bigcode-heads': ('gpt_bigcode', GPT2 | dict(multi_query=False), 'AutoModel', 'text'),
    'gpt_neo': ('gpt_neo', dict(vocab_size=60, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=24,
                attention_types=[[['global','local'],1]], window_size=4, max_position_embeddings=40,
                bos_token_id=1, eos_token_id=2), 'AutoModel', 'text'),
    'gptj': ('gptj', GPT2 | dict(rotary_dim=2), 'AutoModel', 'text'),
    'gpt_neox': ('gpt_neox', BASE, 'AutoModel', 'text'),
    'gpt_neox-sequential': ('gpt_neox', BASE | dict(use_parallel_residual=False, attention_bias=False),
                            'AutoModel', 'text'),
    'opt': ('opt', BASE | dict(ffn_dim=24, word_embed_proj_dim=8), 'AutoModel', 'text'),
    'opt-post-norm': ('opt', BASE | dict(ffn_dim=24, word_embed_proj_dim=16, do_layer_norm_before=False,
                      enable_bias=False), 'AutoModel', 'text'),
    'bloom': ('bloom', dict(vocab_size=60, hidden_size=16, n_layer=2, n_head=4), 'AutoModel', 'text'),
    'falcon': ('falcon', BASE | dict(new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=24),
               'AutoModel', 'text'),
    'falcon-heads': ('falcon', BASE | dict(multi_query=False, bias=True, alibi=True, parallel_attn=False),
                     'AutoModel', 'text'),
    'falcon-one-key': ('falcon', BASE | dict(multi_query=True), 'AutoModel', 'text'),
    # encoder-decoders
    't5': ('t5', T5, 'AutoModel', 'pair'),
    't5-gated': ('t5', T5 | dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False),
                 'AutoModelForSeq2SeqLM', 'pair'),
    't5-writer': ('t5', T5, 'AutoModelForSeq2SeqLM', 'pair'),
    't5-classifier': ('t5', T5 | dict(decoder_start_token_id=0), 'AutoModelForSequenceClassification', 'ends'),
    'mt5': ('mt5', T5 | dict(feed_forward_proj='gated-gelu'), 'AutoModel', 'pair'),
    'umt5': ('umt5', T5 | dict(feed_forward_proj='gated-gelu'), 'AutoModel', 'pair'),
    'bart': ('bart', BART, 'AutoModel', 'pair'),
    'bart-writer': ('bart', BART, 'AutoModelForSeq2SeqLM', 'pair'),
    'bart-classifier': ('bart', BART, 'AutoModelForSequenceClassification', 'ends'),
    'mbart': ('mbart', BART, 'AutoModel', 'pair'),
    'marian': ('marian', BART | dict(decoder_vocab_size=60), 'AutoModel', 'pair'),
    'pegasus': ('pegasus', BART, 'AutoModel', 'pair'),
    'm2m_100': ('m2m_100', BART, 'AutoModel', 'pair'),
    'whisper': ('whisper', BART | dict(num_mel_bins=6, max_source_positions=5, max_target_positions=20,
                suppress_tokens=None, begin_suppress_tokens=None), 'AutoModel', 'spoken'),
    # images and sound
    'vit': ('vit', IMAGE, 'AutoModel', 'image'),
    'vit-plain': ('vit', IMAGE | dict(qkv_bias=False), 'AutoModel', 'image'),
    'vit-classifier': ('vit', IMAGE, 'AutoModelForImageClassification', 'image'),
    'deit': ('deit', IMAGE, 'AutoModel', 'image'),
    'beit': ('beit', IMAGE | dict(use_relative_position_bias=True, vocab_size=20), 'AutoModel', 'image'),
    'beit-shared': ('beit', IMAGE | dict(use_shared_relative_position_bias=True, vocab_size=20), 'AutoModel', 'image'),
    'dinov2': ('dinov2', IMAGE | dict(mlp_ratio=2), 'AutoModel', 'image'),
    'dinov2-gated': ('dinov2', IMAGE | dict(mlp_ratio=2, use_swiglu_ffn=True), 'AutoModel', 'image'),
    'dinov3_vit': ('dinov3_vit', IMAGE, 'AutoModel', 'image'),
    'dinov3_vit-gated': ('dinov3_vit', IMAGE | dict(use_gated_mlp=True, num_register_tokens=2), 'AutoModel', 'image'),
    'swin': ('swin', SWIN, 'AutoModel', 'image'),
    'clip': ('clip', TOWERS, 'AutoModel', 'both'),
    'clip_text_model': ('clip_text_model', TEXT, 'AutoModel', 'text'),
    'clip_vision_model': ('clip_vision_model', IMAGE, 'CLIPVisionModel', 'image'),
    'siglip': ('siglip', TOWERS, 'AutoModel', 'both'),
    'siglip_text_model': ('siglip_text_model', TEXT, 'SiglipTextModel', 'whole'),
    'siglip_vision_model': ('siglip_vision_model', IMAGE, 'SiglipVisionModel', 'image'),
    'audio-spectrogram-transformer': ('audio-spectrogram-transformer', dict(hidden_size=16, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=24, patch_size=4, frequency_stride=2, time_stride=3, max_length=13,
        num_mel_bins=8), 'AutoModel', 'spectrum'),
    'wav2vec2': ('wav2vec2', SOUND, 'AutoModel', 'sound'),
    'wav2vec2-pre-norm': ('wav2vec2', SOUND | dict(do_stable_layer_norm=True), 'AutoModel', 'sound'),
    'hubert': ('hubert', SOUND, 'AutoModel', 'sound'),
    # experts
    'mixtral': ('mixtral', MIXTURE, 'AutoModel', 'text'),
    'qwen3_moe': ('qwen3_moe', MIXTURE, 'AutoModel', 'text'),
    'qwen3_moe-some': ('qwen3_moe', MIXTURE | dict(mlp_only_layers=[0]), 'AutoModel', 'text'),
    'gpt_oss': ('gpt_oss', MIXTURE | dict(head_dim=4, sliding_window=4), 'AutoModel', 'text'),
}
LENGTHS = (7, 3, 5)
VOCAB = 19 # ids that every model has


def build(name, seed=0, std=.2):
    "The model of a case, float64, every weight and bias random; skipped where this transformers has no such family."
    kind, options, auto, _ = ZOO[name]
    if kind not in CONFIG_MAPPING: pytest.skip(f'transformers {transformers.__version__} has no {kind!r}')
    config = CONFIG_MAPPING[kind](**options)
    config._attn_implementation = 'eager'
    cls = getattr(transformers, auto)
    torch.manual_seed(seed)
    model = (cls.from_config if auto.startswith('Auto') else cls)(config)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for k, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=gen)*std + (p.ndim==1 and 'norm' in k.lower() and 'weight' in k))
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
    kind, gen = ZOO[name][3], torch.Generator().manual_seed(seed)
    size = ZOO[name][1].get('image_size') or 12
    def text(lengths=LENGTHS, **more): return _ids(n, lengths, gen, **more)
    parts = {
        'text': lambda: dict(input_ids=text()),
        'whole': lambda: dict(input_ids=text((12,))),
        'global': lambda: dict(input_ids=text((9,4,6))),
        'pair': lambda: dict(input_ids=text(), decoder_input_ids=text((4,6,2))),
        'ends': lambda: _ended(text(end=1 if 't5' in name else 2)),
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

def _ended(ids): # an encoder-decoder classifier reads the last end of its decoder's words, which are the encoder's
    return dict(input_ids=ids)

MASKS = dict(input_ids='attention_mask', decoder_input_ids='decoder_attention_mask', input_values='attention_mask')

def collate(rows):
    "One padded batch."
    batch = {}
    for k in rows[0]:
        ragged = len({o[k].shape for o in rows})>1
        batch[k] = torch.nn.utils.rnn.pad_sequence([o[k] for o in rows], batch_first=True)
        if k in MASKS and rows[0][k].ndim==1:
            lengths = torch.tensor([len(o[k]) for o in rows])
            batch[MASKS[k]] = (torch.arange(lengths.max())<lengths[:,None]).long()
    return batch

def alone(rows, i): return collate(rows[i:i+1])


# --- a loss for each example ----------------------------------------------------------------

def _projection(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

def _spread(x, seed, mask=None):
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
    if 'image_embeds' in out: return _spread(out['text_embeds'], 2) + _spread(out['image_embeds'], 3)
    x = next(o for o in out.values() if torch.is_tensor(o) and o.is_floating_point())
    return _spread(x, 2, _real(model, batch, x))
