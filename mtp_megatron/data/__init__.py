"""From files to batches: corpus, tokenizer, Megatron's indexed data set, resumable batches.

Nothing is imported here, so that a command pays only for what it uses:

- :mod:`.tokenizer`, :mod:`.huggingface` and :mod:`.tokenizer_store` (``choose_tokenizer``), :mod:`.manifest`
  (``load_manifest``, ``check_vocab``), :mod:`.blend` (``load_blend``) and :mod:`.batch_sizes` (where a run is in its
  data) need neither torch nor megatron;
- :mod:`.preprocess` (``preprocess``) writes a data set and imports megatron-core when it comes to writing;
- :mod:`.adopt` (``adopt``) makes one of files that Megatron-LM wrote, without megatron;
- :mod:`.dataset` (``build_datasets``) and :mod:`.loader` (``build_train_iterator``, ``build_valid_batches``) feed
  training.
"""
