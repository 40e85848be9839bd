//! posternd.
fn main() {}
