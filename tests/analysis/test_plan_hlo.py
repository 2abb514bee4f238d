"""What a compiled program moves: hand-written HLO in the forms of the TPU and GPU compilers, counted by hand."""

import pytest

from kdjax.analysis import plan_hlo
from kdjax.analysis.plan_hlo import Collective, sent_bytes

# What the texts below write in a word.
WORDS = {
    "FOUR": "channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true",
    "NAMED": "channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}",
    "COUNTED": 'backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}',
}

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def stated(kind, target, name):
    """What a transfer between slices says of itself."""
    said = {"megascale_target": target, "megascale_transfer_type": kind, "host_transfer_rendezvous": name}
    return "frontend_attributes={" + ",".join(f'_xla_{key}="{value}"' for key, value in said.items()) + "}"


# A scan of 5 layers that gathers a bf16 weight and reduces its gradient, in a scan of 3 micro-batches; then a norm.
LOOPS = (
    """HloModule jit_step
"""
    + ADD
    + """
%inner_body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %w = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %gathered = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%w), NAMED, metadata={op_name="jit(step)/layer/reshard"}
  %reduced = f32[4,8]{1,0} reduce-scatter(%other), FOUR, dimensions={0}, to_apply=%add
  ROOT %t = (s32[], bf16[4,8]) tuple(%n, %w)
}

%inner_condition (p: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %p = (s32[], bf16[4,8]) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%n, %limit), direction=LT
}

%outer_body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]) parameter(0)
  %zero = s32[] constant(2)
  %start = s32[] copy(%zero)
  %w = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %init = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%start, %w)
  ROOT %inner = (s32[]{:T(128)}, /*index=1*/bf16[4,8]{1,0}) while(%init), condition=%inner_condition, body=%inner_body
}

%outer_condition (p: (s32[], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,8]) parameter(0)
  ROOT %go = pred[] custom-call(%p), custom_call_target="x"
}

ENTRY %main (x: bf16[4,8]) -> f32[] {
  %x = bf16[4,8]{1,0} parameter(0)
  %loop = (s32[], bf16[4,8]{1,0}) while(%begin), condition=%outer_condition, body=%outer_body, COUNTED
  ROOT %norm = f32[] all-reduce(%value), FOUR, to_apply=%add
}
"""
)

# As TPU writes them: one asynchronous gather in three pieces, a fused reduce-scatter, a tuple that is reduced at once.
PIECES = """HloModule jit_step

%fused_start (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %g.1 = bf16[16,8]{1,0} all-gather(%p), FOUR, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.1 (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %g.2 = bf16[16,8]{1,0} all-gather(%p), FOUR, frontend_attributes={chain_id="0"}
}

%fused_done (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %g.3 = bf16[16,8]{1,0} all-gather(%p), FOUR, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.3.clone (a: f32[8,8], b: f32[8]) -> (f32[2,8], f32[2]) {
  %a = f32[8,8]{1,0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %both = (f32[8,8]{1,0:T(8,128)}, f32[8]{0:T(128)}) all-reduce(%a, %b), FOUR, to_apply=%add
}

ENTRY %main_spmd (x: bf16[4,8], y: f32[8,8]) -> f32[2,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %s = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%fused_start
  %m = bf16[16,8]{1,0} fusion(%s), kind=kOutput, calls=%async_collective_fusion.1
  %d = bf16[16,8]{1,0} fusion(%m), kind=kCustom, calls=%fused_done
  %r = (f32[2,8]{1,0}, f32[2]{0}) fusion(%y, %z), kind=kCustom, calls=%all-reduce-scatter.3.clone
  ROOT %t = (f32[8,8]{1,0}, bf16[4]{0}) all-reduce(%y, %v), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""

# As the GPU compiler writes them: starts with tuples, a wrapped reduce-scatter, groups as an iota.
STARTS = """HloModule jit_step

%wrapped (p: f32[16]) -> f32[2] {
  %p = f32[16]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%p), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[4]) -> f32[] {
  %gs = (f32[4]{0}, f32[32]{0}) all-gather-start(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %gd = f32[32]{0} all-gather-done(%gs)
  %as = ((f32[16]{0}), f32[2]{0}) async-start(%y), calls=%wrapped
  %ad = f32[2]{0} async-done(%as), calls=%wrapped
  %ar = f32[6]{0} all-reduce-start(%z), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %ard = f32[6]{0} all-reduce-done(%ar)
  %ps = (f32[10]{0}, f32[10]{0}, u32[], u32[]) collective-permute-start(%z), source_target_pairs={{0,1},{1,2}}
  %pd = f32[10]{0} collective-permute-done(%ps)
}
"""

# As TPU sends to other slices: a gather of parts over two of them and a reduction over four in a loop of 3; a host's.
SLICES = (
    (
        """HloModule jit_step

%body (p: (s32[], f32[6])) -> (s32[], f32[6]) {
  %s = (f32[6]{0:T(128)}, u32[], token[]) send(%g, %after-all), channel_id=2, is_host_transfer=true, SUMMED
  %r = (f32[6]{0:T(128)}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, SUMMED
  %sd = token[] send-done(%s), channel_id=2, is_host_transfer=true
}

ENTRY %main (x: f32[4]) -> f32[] {
  %loop = (s32[], f32[6]{0}) while(%begin), condition=%condition, body=%body, COUNTED
  %s.1 = (bf16[8,16]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%x, %after-all), channel_id=3, GATHERED
  %r.1 = (bf16[16,16]{1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after-all), channel_id=4, GATHERED
  %s.2 = (s32[2]{0}, u32[], token[]) send(%y, %after-all), channel_id=5, is_host_transfer=true
  %s.3 = (f32[5]{0}, u32[], token[]) send(%y, %after-all), channel_id=6, PASSED
}
"""
    )
    .replace("SUMMED", stated("ALL_REDUCE", "{1,2,3,4}x{0:3}", "psum.7_0"))
    .replace("GATHERED", stated("ALL_GATHER", "{1,2}x{0:3}", "all-gather.2_0"))
    .replace("PASSED", stated("ONE_TO_ONE", "{{100000->200000},{200000->100000}}", "ppermute.3_0"))
)


def moved(text, devices=4):
    for word, meaning in WORDS.items():
        text = text.replace(word, meaning)
    return plan_hlo.traffic(text, devices)


def counted(text, devices=4):
    return [(one.kind, one.bytes, one.group, one.times) for one in moved(text, devices).collectives]


def test_bodies_count_as_often_as_their_loops_turn():
    """The inner loop counts from 2 to 5, inside one of 3: 9 times."""
    found = counted(LOOPS)
    assert found == [("all-gather", 256, 4, 9), ("reduce-scatter", 512, 4, 9), ("all-reduce", 4, 4, 1)]
    traffic = moved(LOOPS)
    assert traffic.unknown_loops == 0
    assert traffic.collectives[0].where == "jit(step)/layer/reshard"
    assert traffic.sent == 9 * 256 * 3 / 4 + 9 * 512 * 3 / 4 + 2 * 4 * 3 / 4


def test_a_loop_of_unknown_length_counts_once_and_is_said():
    traffic = moved(LOOPS.replace("COUNTED", "metadata={}"))
    assert traffic.unknown_loops == 1
    assert [one.times for one in traffic.collectives] == [3, 3, 1]


def test_a_limit_in_a_fused_condition_is_found():
    fused = LOOPS.replace(
        "ROOT %lt = pred[]{:T(512)} compare(%n, %limit), direction=LT",
        "ROOT %lt = pred[]{:T(512)} fusion(%n, %limit), kind=kLoop, calls=%compared",
    ).replace(
        "%outer_body (p",
        "%compared (a: s32[]) -> pred[] {\n  ROOT %c = pred[] compare(%a, %b), direction=LT\n}\n\n%outer_body (p",
    )
    assert counted(fused) == counted(LOOPS)


def test_pieces_of_an_asynchronous_gather_are_one_and_a_fused_reduce_scatter_is_told():
    assert counted(PIECES) == [
        ("all-gather", 256, 4, 1),
        ("reduce-scatter", 8 * 8 * 4 + 8 * 4, 4, 1),
        ("all-reduce", 8 * 8 * 4 + 4 * 2, 2, 1),
    ]


def test_what_a_kernel_says_of_itself_ends_no_computation():
    """Splash attention writes the sizes of its blocks over several lines."""
    kernel = """  %k = f32[4]{0} custom-call(%x), frontend_attributes={said="{
"block": "{8,
}"
}"}, metadata={op_name="jit(step)/attention"}
"""
    assert counted(PIECES.replace("  %r = (f32", kernel + "  %r = (f32")) == counted(PIECES)


def test_starts_count_and_their_ends_do_not():
    assert counted(STARTS, 8) == [
        ("all-gather", 128, 8, 1),
        ("reduce-scatter", 64, 8, 1),
        ("all-reduce", 24, 2, 1),
        ("collective-permute", 40, 2, 1),
    ]


def test_what_goes_to_other_slices():
    found = moved(SLICES).collectives
    assert counted(SLICES) == [("all-reduce", 24, 4, 3), ("all-gather", 512, 2, 1), ("collective-permute", 20, 2, 1)]
    assert all(one.network and one.members == () for one in found)
    assert [one.where for one in found] == ["psum.7_0", "all-gather.2_0", "ppermute.3_0"]
    assert not any(one.network for one in moved(LOOPS).collectives)


def test_what_a_ring_sends():
    assert sent_bytes("all-gather", 100, 4) == sent_bytes("reduce-scatter", 100, 4) == sent_bytes("all-to-all", 100, 4)
    assert sent_bytes("all-gather", 100, 4) == 75
    assert sent_bytes("all-reduce", 100, 4) == 150
    assert sent_bytes("collective-permute", 100, 4) == 100
    assert sent_bytes("all-reduce", 100, 1) == 0


@pytest.mark.parametrize(
    ("members", "axis"),
    [((0, 1), "model"), ((0, 2, 4), "data"), ((0, 6), "replica"), ((0, 1, 2, 3, 4, 5), "data+model"), ((0, 3), "")],
)
def test_along_which_axis(members, axis):
    """Devices of replica 2 x data 3 x model 2, numbered row by row."""
    one = Collective("all-reduce", 8, len(members), 1, members)
    assert plan_hlo.by_axis(one, {"replica": 2, "data": 3, "model": 2}) == axis


def test_groups_in_all_their_forms():
    def members(groups):
        line = f"  ROOT %r = f32[4]{{0}} all-reduce(%x), {groups}, to_apply=%add"
        (found,) = plan_hlo.traffic(f"ENTRY %main (x: f32[4]) -> f32[4] {{\n{line}\n}}\n", 8).collectives
        return found.members

    assert members("replica_groups={{1,3},{0,2}}") == (1, 3)
    assert members("replica_groups=[2,4]<=[8]") == (0, 1, 2, 3)
    assert members("replica_groups=[4,2]<=[2,4]T(1,0)") == (0, 4)
    assert members("replica_groups=mesh['a'=2,'b'=4] {'a'}") == (0, 4)
    assert members("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}") == (0, 1, 4, 5)
    assert members("replica_groups={}") == tuple(range(8))


def test_the_largest_arrays_are_those_in_hbm():
    text = """HloModule jit_step

%fused (p: f32[8]) -> f32[900] {
  %p = f32[8]{0} parameter(0)
  ROOT %inside = f32[900]{0} broadcast(%p)
}

ENTRY %main (x: f32[1000]) -> f32[] {
  %x = f32[1000]{0} parameter(0)
  %fast = f32[800]{0:T(256)S(1)} copy(%x)
  %view = f32[700]{0} bitcast(%x)
  %made = (f32[600]{0:T(256)}, bf16[10]{0}) fusion(%x), calls=%fused, metadata={op_name="jit(step)/made[\\'x\\']"}
  %half = bf16[500]{0} convert(%x)
}
"""
    found = plan_hlo.largest_arrays(text, 2, least=100)
    assert found == [(2400, "f32[600]", "jit(step)/made['x']"), (1000, "bf16[500]", "")]


def test_sizes_of_arrays():
    assert (
        plan_hlo.array_bytes("(f32[2,3]{1,0}, bf16[4], pred[8], s4[6], f8e4m3fn[5], s32[], token[])")
        == 24 + 8 + 8 + 3 + 5 + 4
    )


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(
        ValueError, match=r"^the program's text must have an ENTRY computation, got none; it is no HLO\.$"
    ):
        plan_hlo.traffic("HloModule nothing", 4)
