//! A program of the target, from its first entry to its end.
//!
//! Each thread of the enclave that runs has one of this process. The main one is entered with the
//! arguments; others when the program asks for them, by whichever control structure is free.

use std::{
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        mpsc::{Sender, channel},
    },
    thread,
    time::Duration,
};

use sgx_emu::{Exit, Fault, Registers};

use crate::{
    backend::Backend,
    calls::{Calls, Next},
};

/// What a program is given.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// Its arguments, the first its own name.
    pub arguments: Vec<Vec<u8>>,
    /// The control socket of the posternd that it may attach to.
    pub daemon: Option<PathBuf>,
}

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// By its own will.
    Exited,
    /// It panicked, or its main function answered a failure; with what it said, if it is one for
    /// debugging.
    Panicked(String),
    /// By a fault.
    Fault(Fault),
    /// It called what there is not, or gave back memory that was not its own.
    Violation {
        /// Number of the call.
        call: u64,
    },
    /// Its main thread left instead of ending the program, or it could not be entered.
    Left,
}

/// Bytes that a program for debugging may say in a panic.
const PANIC_BYTES: usize = 1024;

/// How long a new thread waits for a control structure to become free.
const PATIENCE: Duration = Duration::from_millis(200);

struct Running {
    backend: Arc<dyn Backend>,
    calls: Calls,
    /// Numbers of the threads that nobody is in.
    free: Mutex<Vec<usize>>,
    freed: Condvar,
    tcs: Vec<u64>,
    end: Sender<End>,
}

/// Runs the program to its end. Other threads of it may still be inside: end the process.
///
/// # Panics
/// If the system has no thread to give for the main one.
pub fn run(backend: Arc<dyn Backend>, program: &Program) -> End {
    let tcs = backend.threads();
    let (end, ended) = channel();
    let free = Mutex::new((1..tcs.len()).rev().collect());
    let calls = Calls::new(program.daemon.clone(), backend.clone());
    let running = Arc::new(Running { backend, calls, free, freed: Condvar::new(), tcs, end });
    let Some(arguments) = running.arguments(program) else { return End::Left };
    let main = running.clone();
    let started = thread::Builder::new().name("enclave main".into()).spawn(move || {
        main.thread(0, arguments);
        // A program ends by a call; a main thread that returns has none to make.
        let _ = main.end.send(End::Left);
    });
    if started.is_err() {
        return End::Left;
    }
    ended.recv().unwrap_or(End::Left)
}

impl Running {
    /// Puts the arguments where the program looks for them; `None` if there is no memory for them.
    fn arguments(&self, program: &Program) -> Option<Registers> {
        let memory = &self.calls.memory;
        let count = program.arguments.len();
        let list = memory.allocate(count * 16, 8).ok()?;
        for (argument, descriptor) in program.arguments.iter().zip((list..).step_by(16)) {
            memory.give(descriptor, argument).ok()?;
        }
        Some(Registers { rdi: list, rsi: count as u64, ..Registers::default() })
    }

    /// Runs one thread of the enclave until it leaves for good.
    fn thread(self: &Arc<Self>, number: usize, mut registers: Registers) {
        let Some(tcs) = self.tcs.get(number).copied() else { return };
        let inbox = self.calls.inboxes.begin(tcs);
        let panic_text = self.calls.memory.allocate(PANIC_BYTES, 8).unwrap_or(0);
        let end = loop {
            registers.r10 = panic_text;
            let left = match self.backend.enter(number, registers) {
                Ok(Exit::Left(left)) => left,
                Ok(Exit::Fault(fault)) => break Some(End::Fault(fault)),
                Err(_) => break Some(End::Left),
            };
            if left.rdi == 0 {
                break None;
            }
            let parameters = [left.rsi, left.rdx, left.r8, left.r9];
            match self.calls.serve(&inbox, left.rdi, parameters, || self.launch()) {
                Next::Return((rsi, rdx)) => {
                    registers = Registers { rsi, rdx, ..Registers::default() };
                }
                Next::Exit { panic: false } => break Some(End::Exited),
                Next::Exit { panic: true } => {
                    break Some(End::Panicked(self.panic_text(panic_text)));
                }
                Next::Violation => break Some(End::Violation { call: left.rdi }),
            }
        };
        self.calls.inboxes.end(tcs);
        let _ = self.calls.memory.free(panic_text);
        match end {
            Some(end) => {
                // The first end counts; nobody listens any more to a second.
                let _ = self.end.send(end);
            }
            None if number != 0 => self.give_back(number),
            None => {}
        }
    }

    fn give_back(&self, number: usize) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(number);
        self.freed.notify_one();
    }

    /// Starts another thread, if one of the enclave is free. One that the program has joined may
    /// still be on its way out: it is waited for a little.
    fn launch(self: &Arc<Self>) -> bool {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = self.freed.wait_timeout_while(free, PATIENCE, |free| free.is_empty());
        let Some(number) = wait.unwrap_or_else(PoisonError::into_inner).0.pop() else {
            return false;
        };
        let running = self.clone();
        let started = thread::Builder::new()
            .name(format!("enclave {number}"))
            .spawn(move || running.thread(number, Registers::default()));
        if started.is_err() {
            self.give_back(number);
        }
        started.is_ok()
    }

    fn panic_text(&self, address: u64) -> String {
        let bytes = self.calls.memory.read(address, PANIC_BYTES).unwrap_or_default();
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    }
}
