//! Raw bindings to libaio.
