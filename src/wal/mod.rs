//! Continuous archiving: assembler and ledger (pure), receiver (the loop).
