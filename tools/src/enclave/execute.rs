//! `postern enclave run`.

use std::{io::Write as _, os::unix::ffi::OsStrExt as _, sync::Arc, time::Instant};

use sgx_emu::{Config, Enclave, Fault, FaultKind, KeyRoot, LoadError};
use sgx_image::{Sigstruct, Symbols};
use sgx_runner::{Backend, Emulated, End, Exits, Program, hw};

use crate::{
    enclave::{
        BackendArg, RunArgs,
        files::{self, Loaded, hex},
    },
    error::{Exit, Failure},
};

/// Exit code of a program that panicked, as outside of an enclave.
const PANICKED: u8 = 101;

/// Loads and runs; the exit code of the command. This process is the enclave's alone.
pub fn execute(args: &RunArgs) -> Result<u8, Failure> {
    let began = Instant::now();
    let loaded = Loaded::read(&args.image)?;
    let place = args.image.image.display();
    if let Some(wanted) = &args.mrenclave {
        let is = hex(&loaded.image.mrenclave());
        if !wanted.eq_ignore_ascii_case(&is) {
            let what = format!("the measurement is {is}, not {wanted}");
            let advice = "this is another image, or it is laid out otherwise";
            return Err(Failure::new(Exit::CannotExecute, what, place, advice));
        }
    }
    let signature = match &args.signature {
        Some(path) => {
            let signature = files::signature(path)?;
            files::verify(&loaded, &signature, path)?;
            Some(signature)
        }
        None => None,
    };
    let backend = backend(args, &loaded, signature.as_ref())?;
    let loading = began.elapsed();
    let mut arguments = vec![args.image.image.as_os_str().as_bytes().to_vec()];
    arguments.extend(args.arguments.iter().map(|argument| argument.as_bytes().to_vec()));
    let end = sgx_runner::run(backend.clone(), &Program { arguments, daemon: args.daemon.clone() });
    // What the program wrote and did not flush; a reader that went away has no use for it.
    let _ = std::io::stdout().flush();
    if args.counts {
        let counts = backend.counts();
        eprintln!(
            "postern: {} ({}): {} entries, {} exits ({}), {} faults",
            place,
            backend.name(),
            counts.entries,
            counts.exits.iter().sum::<u64>(),
            Exits(&counts),
            counts.faults
        );
        eprintln!("postern: loaded in {:.1} ms", loading.as_secs_f64() * 1e3);
    }
    tell(&end, &loaded.symbols, place)
}

/// What runs the enclave: chosen by what was asked for and what the machine has.
fn backend(
    args: &RunArgs,
    loaded: &Loaded,
    signature: Option<&Sigstruct>,
) -> Result<Arc<dyn Backend>, Failure> {
    let place = args.image.image.display();
    match (args.backend, signature) {
        // Auto: who names a root wants the emulator.
        (BackendArg::Auto, _) if args.root.is_some() => emulator(args, loaded, signature),
        (BackendArg::Hw, _) if args.root.is_some() => {
            let advice = "leave --root away, or give --backend emu";
            Err(Failure::new(Exit::Usage, "a CPU has its own root of keys", place, advice))
        }
        (BackendArg::Hw, None) => {
            let what = "the CPU runs only images that are signed";
            let advice = "sign it by `postern enclave sign`, and give --signature";
            Err(Failure::new(Exit::CannotExecute, what, place, advice))
        }
        (BackendArg::Hw, Some(signature)) => hardware(args, loaded, signature),
        (BackendArg::Auto, Some(signature)) if hw::is_present() => {
            hardware(args, loaded, signature)
        }
        _ => emulator(args, loaded, signature),
    }
}

fn hardware(
    args: &RunArgs,
    loaded: &Loaded,
    signature: &Sigstruct,
) -> Result<Arc<dyn Backend>, Failure> {
    let enclave = hw::Hardware::load(&loaded.image, signature).map_err(|error| {
        let advice = "see that the machine has SGX and /dev/sgx_enclave, or give --backend emu";
        Failure::new(Exit::CannotExecute, error, args.image.image.display(), advice)
    })?;
    Ok(Arc::new(enclave))
}

fn emulator(
    args: &RunArgs,
    loaded: &Loaded,
    signature: Option<&Sigstruct>,
) -> Result<Arc<dyn Backend>, Failure> {
    let config = Config {
        exact: args.exact,
        strict: args.strict,
        transition_cycles: args.transition_cycles,
        root: args.root.as_deref().map_or(Ok(KeyRoot::default()), files::root)?,
    };
    let place = args.image.image.display();
    let enclave = Enclave::load(&loaded.image, signature, &config)
        .map_err(|error| Failure::new(Exit::CannotExecute, &error, place, advice(&error)))?;
    if args.strict && !enclave.cpuid_faults() {
        eprintln!("postern: CPUID is not caught: this CPU or its hypervisor cannot make it fault");
    }
    Ok(Arc::new(Emulated(enclave)))
}

/// Says how the program ended; its exit code.
fn tell(end: &End, symbols: &Symbols, place: impl std::fmt::Display) -> Result<u8, Failure> {
    match end {
        End::Exited => Ok(0),
        End::Panicked(text) => {
            if !text.is_empty() {
                eprintln!("{text}");
            }
            Ok(PANICKED)
        }
        End::Fault(fault) => {
            let at = match fault.offset() {
                Some(offset) => format!("{offset:#x} in {}", symbols.name(offset)),
                None => format!("{:#x} outside of it", fault.instruction),
            };
            eprintln!("postern: {fault}: {place}: at {at}");
            Ok(128 + signal_of(fault))
        }
        End::Violation { call } => {
            let what = format!("the enclave made usercall {call}, which there is not or not so");
            let advice = "the program was made for another runner";
            Err(Failure::new(Exit::CannotExecute, what, place, advice))
        }
        _ => {
            let advice = "its runtime is of another version";
            Err(Failure::new(Exit::CannotExecute, "the enclave left without an end", place, advice))
        }
    }
}

/// The signal that this fault is to a program outside of an enclave.
fn signal_of(fault: &Fault) -> u8 {
    let signal = match fault.kind {
        FaultKind::Memory { .. } => libc::SIGSEGV,
        FaultKind::SystemCall { .. } => libc::SIGSYS,
        FaultKind::Exception { signal } => signal,
        _ => libc::SIGILL,
    };
    u8::try_from(signal).unwrap_or_default()
}

fn advice(error: &LoadError) -> &'static str {
    match error {
        LoadError::NoFsGsBase => "use Linux 5.9 or newer on a CPU with FSGSBASE",
        LoadError::System(_) => "see what the limits of this process are (ulimit -v)",
        _ => "build and sign the image again",
    }
}
