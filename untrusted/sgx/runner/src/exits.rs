//! What an enclave was left for, by name.

use core::fmt;

use sgx_emu::{Counts, EXIT_KINDS};

/// The usercalls by their numbers; 0 is the end of a thread, the last what there is not.
const NAMES: [&str; EXIT_KINDS] = [
    "end of a thread",
    "read",
    "read_alloc",
    "write",
    "flush",
    "close",
    "bind_stream",
    "accept_stream",
    "connect_stream",
    "launch_thread",
    "exit",
    "wait",
    "send",
    "insecure_time",
    "alloc",
    "free",
    "async_queues",
    "another number",
];

/// The exits of these counts as text, those that there were: `wait 3, flush 1`, or `none`.
#[derive(Clone, Copy, Debug)]
pub struct Exits<'a>(pub &'a Counts);

impl fmt::Display for Exits<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = "";
        for (name, count) in NAMES.iter().zip(self.0.exits).filter(|(_, count)| *count > 0) {
            write!(f, "{before}{name} {count}")?;
            before = ", ";
        }
        if before.is_empty() { f.write_str("none") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_named_by_the_numbers_of_the_targets_abi() {
        let mut counts = Counts::default();
        assert_eq!(Exits(&counts).to_string(), "none");
        // Numbers of fortanix-sgx-abi: flush 4, wait 11, alloc 14.
        (counts.exits[4], counts.exits[11], counts.exits[14]) = (1, 30, 2);
        counts.exits[EXIT_KINDS - 1] = 5;
        let text = "flush 1, wait 30, alloc 2, another number 5";
        assert_eq!(Exits(&counts).to_string(), text);
    }
}
