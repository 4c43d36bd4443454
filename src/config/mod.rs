//! Configuration: as written (raw) and as meant (model).
