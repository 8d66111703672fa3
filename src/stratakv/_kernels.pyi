class Step:
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
    def set_queries(self, group: int, n_new: int, type: int, n_threads: int) -> None: ...
    def run(
        self,
        slabs: int,
        query: int,
        q_sequence: int,
        q_head: int,
        q_token: int,
        out: int,
        o_sequence: int,
        o_head: int,
        o_token: int,
        lse: int,
    ) -> None: ...

def supported_isas() -> list[str]: ...
def read_all(words: int, n: int, n_threads: int) -> int: ...
