"""Two models under one optimizer; arguments, and a package beside the script."""

import argparse
import sys
from pathlib import Path

import torch
from helpers import batches
from nets import Decoder, Encoder


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    encoder, decoder = Encoder(args.width), Decoder(args.width)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
    with args.out.open("w") as log:
        for step in range(4):
            for x in batches(4):
                loss = (decoder(encoder(x)) - x).pow(2).mean()
                (loss / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
            log.write(f"{step}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
