"""GPU time in us that other packages need on the bench's shapes, on one H100.

Measured on an NVIDIA H100 80GB HBM3 (SXM), torch 2.11.0+cu130, triton 3.6.0, 2026-11-23: median of 20 CUDA-graph
replays of 5 calls each. Head size 128.

fla: fla-core 0.6.0, its Triton path. sglang: 0.5.23, ``kernels.ops.attention.fla`` (decode: its packed kernel and its
fused sigmoid gating one, fsg). flashqla: flash-qla 0.1.3 with tilelang 0.1.15. flashinfer: flashinfer-python
0.7.2.post1 with nvidia-cutlass-dsl 4.8.0.
"""

from __future__ import annotations

# rows -> RMS norm of 128 columns times silu(z), bf16, buffers rotated.
NORM: dict[int, dict[str, float]] = {
    32: {"sglang": 3.6, "fla": 2.6},
    512: {"sglang": 2.8, "fla": 2.5},
    4096: {"sglang": 3.1, "fla": 3.0},
    16384: {"sglang": 6.4, "fla": 5.8},
    65536: {"sglang": 19.0, "fla": 18.7},
    262144: {"sglang": 69.0, "fla": 69.0},
    1048576: {"sglang": 268.3, "fla": 265.0},
}

# H, HV, rows, state dtype -> one token a row, bf16 activations, a pool of twice as many slots at random indices
# (flashinfer with fp32 states and fla: packed states), the same buffers every call.
DECODE: dict[tuple[int, int, int, str], dict[str, float]] = {
    (4, 16, 1, "bfloat16"): {"sglang_packed": 3.7, "sglang_fsg": 4.5, "flashinfer": 3.2},
    (4, 16, 1, "float32"): {"sglang_packed": 5.3, "sglang_fsg": 5.3, "fla": 4.3, "flashinfer": 4.9},
    (4, 16, 8, "bfloat16"): {"sglang_packed": 5.5, "sglang_fsg": 5.4, "flashinfer": 5.0},
    (4, 16, 8, "float32"): {"sglang_packed": 8.4, "sglang_fsg": 8.4, "fla": 8.6, "flashinfer": 7.0},
    (4, 16, 32, "bfloat16"): {"sglang_packed": 11.0, "sglang_fsg": 11.7, "flashinfer": 9.5},
    (4, 16, 32, "float32"): {"sglang_packed": 21.4, "sglang_fsg": 23.2, "fla": 32.4, "flashinfer": 19.2},
    (4, 16, 128, "bfloat16"): {"sglang_packed": 52.2, "sglang_fsg": 55.4, "flashinfer": 53.2},
    (4, 16, 128, "float32"): {"sglang_packed": 97.9, "sglang_fsg": 102.5, "fla": 113.0, "flashinfer": 96.2},
    (4, 16, 256, "bfloat16"): {"sglang_packed": 99.8, "sglang_fsg": 104.2, "flashinfer": 102.0},
    (4, 16, 256, "float32"): {"sglang_packed": 191.1, "sglang_fsg": 197.6, "fla": 221.1, "flashinfer": 186.5},
    (16, 32, 1, "bfloat16"): {"sglang_packed": 4.3, "sglang_fsg": 4.6, "flashinfer": 3.7},
    (16, 32, 1, "float32"): {"sglang_packed": 5.9, "sglang_fsg": 5.9, "fla": 4.7, "flashinfer": 5.0},
    (16, 32, 8, "bfloat16"): {"sglang_packed": 7.4, "sglang_fsg": 7.4, "flashinfer": 7.3},
    (16, 32, 8, "float32"): {"sglang_packed": 11.3, "sglang_fsg": 11.6, "fla": 15.4, "flashinfer": 10.3},
    (16, 32, 32, "bfloat16"): {"sglang_packed": 21.3, "sglang_fsg": 25.3, "flashinfer": 18.3},
    (16, 32, 32, "float32"): {"sglang_packed": 52.1, "sglang_fsg": 55.1, "fla": 59.3, "flashinfer": 51.4},
    (16, 32, 128, "bfloat16"): {"sglang_packed": 99.0, "sglang_fsg": 104.0, "flashinfer": 100.9},
    (16, 32, 128, "float32"): {"sglang_packed": 188.5, "sglang_fsg": 200.4, "fla": 221.2, "flashinfer": 186.7},
    (16, 32, 256, "bfloat16"): {"sglang_packed": 194.1, "sglang_fsg": 202.7, "flashinfer": 195.7},
    (16, 32, 256, "float32"): {"sglang_packed": 370.0, "sglang_fsg": 393.2, "fla": 440.1, "flashinfer": 367.6},
    (16, 64, 1, "bfloat16"): {"sglang_packed": 4.5, "sglang_fsg": 5.0, "flashinfer": 4.1},
    (16, 64, 1, "float32"): {"sglang_packed": 6.9, "sglang_fsg": 6.6, "fla": 5.9, "flashinfer": 5.4},
    (16, 64, 8, "bfloat16"): {"sglang_packed": 11.3, "sglang_fsg": 12.0, "flashinfer": 9.2},
    (16, 64, 8, "float32"): {"sglang_packed": 20.3, "sglang_fsg": 23.1, "fla": 33.2, "flashinfer": 19.7},
    (16, 64, 32, "bfloat16"): {"sglang_packed": 52.1, "sglang_fsg": 58.2, "flashinfer": 52.7},
    (16, 64, 32, "float32"): {"sglang_packed": 96.7, "sglang_fsg": 101.1, "fla": 113.0, "flashinfer": 96.1},
    (16, 64, 128, "bfloat16"): {"sglang_packed": 189.2, "sglang_fsg": 206.8, "flashinfer": 194.7},
    (16, 64, 128, "float32"): {"sglang_packed": 367.6, "sglang_fsg": 386.3, "fla": 437.8, "flashinfer": 367.4},
    (16, 64, 256, "bfloat16"): {"sglang_packed": 372.8, "sglang_fsg": 408.9, "flashinfer": 385.3},
    (16, 64, 256, "float32"): {"sglang_packed": 729.1, "sglang_fsg": 761.3, "fla": 873.1, "flashinfer": 728.7},
}

# H, HV, sequences -> bf16, q and k normalised beforehand, g = logsigmoid(normal) / 16 and beta = sigmoid(normal) in
# fp32, fp32 initial states given and final states written.
PREFILL: dict[tuple[int, int, str], dict[str, float]] = {
    (2, 8, "512"): {"flashqla": 25.3, "fla": 44.6, "sglang": 46.5, "flashinfer": 44.6},
    (2, 8, "2048"): {"flashqla": 69.5, "fla": 83.6, "sglang": 87.1, "flashinfer": 63.9},
    (2, 8, "8192"): {"flashqla": 128.3, "fla": 242.3, "sglang": 311.8, "flashinfer": 117.3},
    (2, 8, "32768"): {"flashqla": 251.4, "fla": 970.8, "sglang": 1232.2, "flashinfer": 248.6},
    (2, 8, "8x1024"): {"flashqla": 62.4, "fla": 142.3, "sglang": 142.6, "flashinfer": 166.8},
    (2, 8, "4x8192"): {"flashqla": 292.0, "fla": 536.8, "sglang": 675.4, "flashinfer": 270.6},
    (2, 8, "8x4096"): {"flashqla": 202.7, "fla": 544.7, "sglang": 558.5, "flashinfer": 311.9},
    (2, 8, "32x256"): {"flashqla": 71.0, "fla": 169.5, "sglang": 150.0, "flashinfer": 46.1},
    (2, 8, "28672+4096"): {"flashqla": 243.6, "fla": 889.2, "sglang": 1155.4, "flashinfer": 248.6},
    (2, 8, "mixed64"): {"flashqla": 231.4, "fla": 521.2, "sglang": 480.7, "flashinfer": 127.4},
    (4, 16, "512"): {"flashqla": 26.4, "fla": 46.5, "sglang": 48.0, "flashinfer": 47.7},
    (4, 16, "2048"): {"flashqla": 74.8, "fla": 101.1, "sglang": 112.6, "flashinfer": 81.2},
    (4, 16, "8192"): {"flashqla": 152.1, "fla": 334.8, "sglang": 416.9, "flashinfer": 153.6},
    (4, 16, "32768"): {"flashqla": 385.9, "fla": 1372.4, "sglang": 1681.9, "flashinfer": 414.7},
    (4, 16, "8x1024"): {"flashqla": 101.6, "fla": 280.2, "sglang": 285.0, "flashinfer": 62.3},
    (4, 16, "4x8192"): {"flashqla": 393.0, "fla": 1085.1, "sglang": 1115.5, "flashinfer": 450.9},
    (4, 16, "8x4096"): {"flashqla": 325.8, "fla": 1080.0, "sglang": 1136.9, "flashinfer": 203.3},
    (4, 16, "32x256"): {"flashqla": 127.7, "fla": 328.3, "sglang": 289.1, "flashinfer": 88.8},
    (4, 16, "28672+4096"): {"flashqla": 409.1, "fla": 1281.9, "sglang": 1586.1, "flashinfer": 415.5},
    (4, 16, "mixed64"): {"flashqla": 419.5, "fla": 1016.0, "sglang": 915.5, "flashinfer": 229.5},
    (8, 32, "512"): {"flashqla": 29.4, "fla": 59.9, "sglang": 59.5, "flashinfer": 63.1},
    (8, 32, "2048"): {"flashqla": 87.5, "fla": 141.5, "sglang": 171.8, "flashinfer": 108.0},
    (8, 32, "8192"): {"flashqla": 307.1, "fla": 507.0, "sglang": 652.9, "flashinfer": 249.4},
    (8, 32, "32768"): {"flashqla": 692.2, "fla": 2149.3, "sglang": 2698.5, "flashinfer": 766.9},
    (8, 32, "8x1024"): {"flashqla": 189.7, "fla": 542.6, "sglang": 527.6, "flashinfer": 119.2},
    (8, 32, "4x8192"): {"flashqla": 634.0, "fla": 2173.2, "sglang": 2297.8, "flashinfer": 383.0},
    (8, 32, "8x4096"): {"flashqla": 625.4, "fla": 2191.6, "sglang": 2200.5, "flashinfer": 400.7},
    (8, 32, "32x256"): {"flashqla": 238.9, "fla": 647.7, "sglang": 559.8, "flashinfer": 158.9},
    (8, 32, "28672+4096"): {"flashqla": 707.0, "fla": 2156.1, "sglang": 2580.6, "flashinfer": 802.8},
    (8, 32, "mixed64"): {"flashqla": 816.9, "fla": 2021.4, "sglang": 1827.1, "flashinfer": 426.5},
    (16, 32, "512"): {"flashinfer": 64.1},
    (16, 32, "2048"): {"flashinfer": 112.1},
    (16, 32, "8192"): {"flashinfer": 265.9},
    (16, 32, "32768"): {"flashinfer": 843.3},
    (16, 32, "8x1024"): {"flashinfer": 128.5},
    (16, 32, "4x8192"): {"flashinfer": 402.4},
    (16, 32, "8x4096"): {"flashinfer": 409.0},
    (16, 32, "32x256"): {"flashinfer": 166.3},
    (16, 32, "28672+4096"): {"flashinfer": 846.4},
    (16, 32, "mixed64"): {"flashinfer": 434.5},
    (16, 48, "512"): {"flashinfer": 92.9},
    (16, 48, "2048"): {"flashinfer": 133.1},
    (16, 48, "8192"): {"flashinfer": 378.2},
    (16, 48, "32768"): {"flashinfer": 1368.7},
    (16, 48, "8x1024"): {"flashinfer": 186.4},
    (16, 48, "4x8192"): {"flashinfer": 737.7},
    (16, 48, "8x4096"): {"flashinfer": 617.1},
    (16, 48, "32x256"): {"flashinfer": 230.3},
    (16, 48, "28672+4096"): {"flashinfer": 1251.2},
    (16, 48, "mixed64"): {"flashinfer": 647.8},
    (16, 64, "512"): {"flashqla": 40.6, "fla": 84.7, "sglang": 86.6, "flashinfer": 108.0},
    (16, 64, "2048"): {"flashqla": 119.7, "fla": 257.4, "sglang": 280.4, "flashinfer": 147.6},
    (16, 64, "8192"): {"flashqla": 402.0, "fla": 950.6, "sglang": 1049.0, "flashinfer": 419.4},
    (16, 64, "32768"): {"flashqla": 1543.4, "fla": 4133.0, "sglang": 4494.7, "flashinfer": 1538.1},
    (16, 64, "8x1024"): {"flashqla": 365.2, "fla": 994.3, "sglang": 1036.7, "flashinfer": 235.6},
    (16, 64, "4x8192"): {"flashqla": 1240.7, "fla": 4160.1, "sglang": 4406.8, "flashinfer": 824.5},
    (16, 64, "8x4096"): {"flashqla": 1257.8, "fla": 4183.1, "sglang": 4406.6, "flashinfer": 814.1},
    (16, 64, "32x256"): {"flashqla": 455.2, "fla": 1142.5, "sglang": 1087.8, "flashinfer": 295.2},
    (16, 64, "28672+4096"): {"flashqla": 1805.7, "fla": 4136.3, "sglang": 4508.3, "flashinfer": 1265.5},
    (16, 64, "mixed64"): {"flashqla": 1589.8, "fla": 3670.3, "sglang": 3639.2, "flashinfer": 848.3},
}

# channels, sequences -> width 4, silu, channel-last pool read and written.
CONV: dict[tuple[int, str], dict[str, float]] = {
    (8192, "2048"): {"sglang": 33.5},
    (8192, "32768"): {"sglang": 457.1},
    (8192, "8192"): {"sglang": 118.6},
    (8192, "8x1024"): {"sglang": 119.2},
    (8192, "mixed64"): {"sglang": 365.0},
}

# channels, rows -> the same for one new token a row.
CONV_UPDATE: dict[tuple[int, int], dict[str, float]] = {
    (8192, 1): {"sglang": 2.6},
    (8192, 8): {"sglang": 3.1},
    (8192, 32): {"sglang": 3.5},
    (8192, 128): {"sglang": 6.7},
    (8192, 256): {"sglang": 11.1},
}

# H, HV, rows, state dtype -> conv update, packed decode and gated norm of one token a row, three kernels in one chain.
STEP: dict[tuple[int, int, int, str], dict[str, float]] = {
    (16, 32, 1, "bfloat16"): {"sglang_3_kernels": 7.5},
    (16, 32, 1, "float32"): {"sglang_3_kernels": 9.2},
    (16, 32, 8, "bfloat16"): {"sglang_3_kernels": 10.7},
    (16, 32, 8, "float32"): {"sglang_3_kernels": 14.5},
    (16, 32, 32, "bfloat16"): {"sglang_3_kernels": 27.1},
    (16, 32, 32, "float32"): {"sglang_3_kernels": 57.2},
    (16, 32, 128, "bfloat16"): {"sglang_3_kernels": 111.6},
    (16, 32, 128, "float32"): {"sglang_3_kernels": 202.9},
    (16, 32, 256, "bfloat16"): {"sglang_3_kernels": 214.2},
    (16, 32, 256, "float32"): {"sglang_3_kernels": 396.0},
}
