"""Finding the inner loop in a disassembly written by hand."""

from nanochat_kernels.triton_kernels import sass

NESTED = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_1:
        /*0020*/                   IDP.4A.U8.S8 R8, R4, R5, R8 ;
        /*0030*/                   @!P1 IDP.4A.U8.S8 R9, R4, R6, R9 ;
        /*0040*/                   NOP ;
        /*0050*/              @P0 BRA `(.L_x_1) ;
        /*0060*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0070*/              @P2 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_9:
        /*0090*/                   BRA `(.L_x_9);
"""

REMAINDER = """
.L_x_0:
        /*0000*/                   IMMA.16832.S8.S8 R8, R4, R5, R8 ;
        /*0010*/                   IMMA.16832.S8.S8 R8, R4, R5, R8 ;
        /*0020*/              @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   IMMA.16832.S8.S8 R8, R4, R5, R8 ;
        /*0040*/              @P0 BRA `(.L_x_1) ;
        /*0050*/              @P1 BRA `(.L_x_2) ;
        /*0060*/                   IMMA.16832.S8.S8 R8, R4, R5, R8 ;
.L_x_2:
        /*0070*/                   EXIT ;
"""


def test_the_innermost_loop_with_the_instruction_is_found_without_its_nops():
    body = sass.inner_loop(NESTED, "IDP")
    assert [text.split()[0] for text in body] == ["IDP.4A.U8.S8", "@!P1", "@P0"]
    assert sass.opcodes(body) == {"IDP": 2, "BRA": 1}


def test_the_unrolled_loop_is_found_and_not_its_remainder():
    assert sass.opcodes(sass.inner_loop(REMAINDER, "IMMA")) == {"IMMA": 2, "BRA": 1}


def test_loads_and_stores_are_counted_by_their_width_whatever_else_modifies_them():
    text = [
        "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
        "@!P0 LDG.E.U8 R9, [R2.64]",
        "LDG.E.LTC128B.64 R4, [R2.64+0x128]",
        "STG.E desc[UR4][R2.64], R0",
        "@P1 STG.E.U16 [R2.64], R0",
        "STG.E.EF.128 [R2.64], R8",
        "STS.128 [R2], R8",
    ]
    assert sass.global_accesses(text) == {
        "LDG.128": 1, "LDG.8": 1, "LDG.64": 1, "STG.32": 1, "STG.16": 1, "STG.128": 1
    }  # fmt: skip


def test_neither_a_forward_branch_nor_a_loop_without_the_instruction_counts():
    assert sass.inner_loop(NESTED, "IMMA") == []
    assert len(sass.instructions(NESTED)) == 10
