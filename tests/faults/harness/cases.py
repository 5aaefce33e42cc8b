"""The campaign's list, and tests elsewhere that belong to a case (a node id or its start)."""

CASES: dict[int, str] = {
    1: "`kill -9` server before a round: resume at N",
    2: "mid-round: resume, round N repeated under a new attempt",
    3: "after aggregation, before the checkpoint: applied once",
    4: "during the checkpoint's write: the previous one loads",
    5: "SIGTERM: drain, exit 0 in 30 s",
    6: "database locked, 500: client retries, stays healthy",
    7: "garbage protobuf: client reconnects, no zombie",
    8: "line cut 5 s: round unaffected",
    9: "line cut 6 min: client counts as failed, rejoins",
    10: "half-open TCP: timeout",
    11: "64 kbit/s upload: succeeds or is named too slow",
    12: "port in use: exit with message",
    13: "two servers on one state folder: second refuses",
    14: "server disk full: run paused, no torn file",
    15: "quorum never reached: exit after deadline, names the missing",
    16: "`kill -9` mid-train: quorum continues",
    17: "instant restart: back-off, no exit",
    18: "training child out of memory, segfault: error code in seconds",
    19: "GPU vanishes: clean failure, no silent CPU",
    20: "killed after ledger write, before send: budget stays spent",
    21: "killed before ledger write: nothing sent",
    22: "client disk full: no training",
    23: "duplicate client, same key: second refused",
    24: "straggler past deadline: late reply discarded and audited",
    25: "hospital withdraws mid-run: weight 0 next round, lineage updated",
    26: "server certificate expired: client refuses, server does not start",
    27: "expiring in < 14 d: warning",
    28: "client certificate expired or revoked: refused",
    29: "wrong-CA server mid-session: refuse, keep trying, recover",
    30: "redirect to another host: refused",
    31: "clock +10 min: says clock skew",
    32: "clock stepped back: monotonic deadlines hold",
    33: "replayed update: refused",
    34: "update signed by A naming B: refused",
    35: "`--insecure` with non-loopback: refused",
    36: "empty or world-writable policy, key, allow-list: no start",
    37: "NaN, Inf: that client only",
    38: "wrong shape, (1,) broadcast: rejected",
    39: "missing, extra keys: rejected",
    40: "float64, int for float32: rejected",
    41: "num-examples 1e15, negative, 0, NaN: capped or rejected",
    42: "norm × 1000: clipped or rejected",
    43: "sign-flip, 1 of 5: within tolerance under a robust strategy",
    44: "npz, pickle, object payload: rejected",
    45: "chunk bomb: rejected before allocation",
    46: "all-zero update: valid",
    47: "all clients rejected: round void, model unchanged",
    48: "extra metric or text field: dropped",
    49: "checkpoint byte-flip: digest error, previous used",
    50: "pickled `.pt` checkpoint: refused",
    51: "audit line edited, removed, tail cut: `verify` names it",
    52: "ledger deleted or rolled back: refuses to train",
    53: "config: unknown key, bad type: exit 2 naming it",
}

_BAD = "tests/strategies/test_bad_updates.py::"
_WIRE = "tests/federation/"
EXISTING: dict[int, tuple[str, ...]] = {
    30: (f"{_WIRE}test_tunnel.py::test_only_a_supernodes_own_calls_pass",),
    33: (
        f"{_WIRE}test_admit.py::test_the_same_answer_counts_once_also_after_a_restart",
        f"{_WIRE}test_receipts.py::test_a_message_counts_once_also_after_a_restart",
    ),
    34: (f"{_WIRE}test_admit.py::test_nobody_answers_in_another_name",),
    43: (
        f"{_BAD}test_43_a_sign_flip_of_one_in_five_is_stood",
        f"{_BAD}test_43_the_plain_mean_does_not_stand_it",
    ),
    45: (
        f"{_BAD}test_45_a_chunk_that_would_unpack_to_gigabytes_is_left_out",
        f"{_WIRE}test_flower_contract.py::"
        "test_a_chunk_that_is_named_many_times_is_refused_before_it_is_put_together",
    ),
    47: (f"{_BAD}test_47_a_round_without_any_sound_update_is_void_and_changes_nothing",),
    52: (
        "tests/client/test_ledger.py::test_a_ledger_put_back_or_begun_anew_is_noticed_by_its_head",
    ),
}

if __name__ == "__main__":
    # For `make faults`, which runs them beside the campaign's own tests.
    print(*(test for tests in EXISTING.values() for test in tests))
