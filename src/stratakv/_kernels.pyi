class _Paged:
    def __init__(self, isa: str) -> None: ...
    def set_pages(self, table: int, table_stride: int, n_sequences: int, n_heads: int, block_tokens: int) -> None: ...
    def set_member(
        self,
        block_bytes: int,
        k_page_bytes: int,
        v_page_bytes: int,
        k_dim: int,
        v_dim: int,
        k_type: int,
        v_type: int,
    ) -> None: ...

class Append(_Paged):
    def set_rows(self, row: int, n_tokens: int, in_groups: bool, n_threads: int) -> None: ...
    def run(
        self, slabs: int, keys: int, k: tuple[int, int, int], values: int, v: tuple[int, int, int], type: int
    ) -> None: ...

class Step(_Paged):
    def set_rows(
        self,
        counts: int,
        skips: int,
        first_positions: int,
        positions: int,
        query_positions: int,
    ) -> None: ...
    def set_rules(
        self, scale: float, softcap: float, is_causal: bool, window: int, sinks: int, slopes: int, head_sinks: int
    ) -> None: ...
    def set_mask(self, data: int, sequence: int, head: int, token: int, kind: int, offset: int) -> None: ...
    def set_queries(self, group: int, n_new: int, type: int, n_threads: int, prompt_queries: int) -> None: ...
    def is_prompt(self) -> bool: ...
    def run(
        self,
        slabs: int,
        query: int,
        q: tuple[int, int, int],
        out: int,
        o: tuple[int, int, int],
        lse: int,
    ) -> None: ...

def supported_isas() -> list[str]: ...
def is_supported(isa: str) -> bool: ...
def tiles_bf16(isa: str) -> bool: ...
def sample_of(addresses: int, sizes: int, n: int) -> int: ...
def read_all(words: int, n: int, n_threads: int) -> int: ...

class Matrix:
    def __init__(self, data: int, n_rows: int, n_columns: int, type: int, bias: int, is_tiled: bool) -> None: ...

class Decoder:
    def __init__(
        self,
        isa: str,
        hidden: int,
        intermediate: int,
        head_dim: int,
        n_query_heads: int,
        n_kv_heads: int,
        norm_epsilon: float,
        embedding_scale: float,
        attention_scale: float,
        attention_softcap: float,
        logit_softcap: float,
        activation: int,
        rounds_activations: bool,
        embedding: Matrix,
        head: Matrix,
        norm: int,
        n_groups: int,
    ) -> None: ...
    def add_layer(
        self,
        qkv: Matrix,
        output: Matrix,
        gate_up: Matrix,
        down: Matrix,
        attention_norm: int,
        query_norm: int,
        key_norm: int,
        after_attention_norm: int,
        mlp_norm: int,
        after_mlp_norm: int,
        rotation: int,
    ) -> None: ...
    def set_pages(
        self,
        layer: int,
        strand: int,
        group: int,
        slabs: int,
        block_bytes: int,
        k_page_bytes: int,
        v_page_bytes: int,
        k_type: int,
        v_type: int,
    ) -> None: ...
    def set_group(
        self,
        group: int,
        table: int,
        table_stride: int,
        counts: int,
        skips: int,
        first_positions: int,
        positions: int,
        block_tokens: int,
        window: int,
        sinks: int,
        new_table: int,
        new_table_stride: int,
        new_row: int,
    ) -> None: ...
    def set_rotation(self, index: int, cosines: int, sines: int, pairs: int) -> None: ...
    def set_room(self, stream: int, normed: int, produced: int, lse: int) -> None: ...
    def forward(
        self,
        tokens: int,
        positions: int,
        n_sequences: int,
        n_new: int,
        n_wanted: int,
        wanted_positions: int,
        logits: int,
        n_threads: int,
        prompt_queries: int,
    ) -> None: ...
