//! The interposition library.
