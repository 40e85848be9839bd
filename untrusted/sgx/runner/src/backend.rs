//! What enters an enclave.

use sgx_emu::{Counts, Enclave, EnterError, Exit, Registers};

/// A loaded enclave, wherever it runs.
pub trait Backend: Send + Sync {
    /// What it is called.
    fn name(&self) -> &'static str;

    /// First address of the enclave.
    fn base(&self) -> u64;

    /// Bytes of its range.
    fn size(&self) -> u64;

    /// Addresses of the thread control structures.
    fn threads(&self) -> Vec<u64>;

    /// Enters by the thread of this number, and returns when it leaves.
    ///
    /// # Errors
    /// Why it was not entered.
    fn enter(&self, thread: usize, registers: Registers) -> Result<Exit, EnterError>;

    /// How often it was entered and left.
    fn counts(&self) -> Counts;

    /// Whether the time stamp counter can be read inside.
    fn counts_time(&self) -> bool {
        true
    }
}

/// An enclave in the emulator.
#[derive(Debug)]
pub struct Emulated(pub Enclave);

impl Backend for Emulated {
    fn name(&self) -> &'static str {
        "emulated"
    }

    fn base(&self) -> u64 {
        self.0.base()
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn threads(&self) -> Vec<u64> {
        self.0.threads().iter().map(|thread| self.0.base() + thread.tcs).collect()
    }

    fn enter(&self, thread: usize, registers: Registers) -> Result<Exit, EnterError> {
        self.0.enter(thread, registers)
    }

    fn counts(&self) -> Counts {
        self.0.counts()
    }
}
