//! posternd.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use posternd::activation::Manager;
use posternd::daemon::{Daemon, Options};
use posternd::probes::loader;
use posternd::problem::{EXIT_CONFIG, Problem, log};
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == loader::ARGUMENT) {
        return ExitCode::from(loader::main(arguments));
    }
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime
        .map_err(|e| unavailable("no runtime to be had", &e))
        .and_then(|runtime| runtime.block_on(run(&options)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            log(&problem.what, &problem.place, &problem.remedy);
            ExitCode::from(problem.exit)
        }
    }
}

fn unavailable(what: &str, error: &std::io::Error) -> Problem {
    Problem {
        what: format!("{what} ({error})"),
        place: "this process".to_owned(),
        remedy: "raise the limits of open files and memory".to_owned(),
        exit: EXIT_CONFIG,
    }
}

async fn run(options: &Options) -> Result<(), Problem> {
    // Before "ready": whoever waits for that line may send a signal next.
    let signals = |kind| signal(kind).map_err(|e| unavailable("signals can not be watched", &e));
    let mut terminate = signals(SignalKind::terminate())?;
    let mut interrupt = signals(SignalKind::interrupt())?;
    // A host file beyond the limit of file sizes is an error of that file, not the daemon's end.
    let _too_large = signals(SignalKind::from_raw(libc::SIGXFSZ))?;
    let manager = Manager::connect();
    let (daemon, listener) = Daemon::start(options, &manager)?;
    manager.ready();
    let mut out = std::io::stdout().lock();
    // Whoever started us without a place to read from does not wait for the line.
    let _ = writeln!(out, "posternd: ready on {}", options.socket.display());
    for endpoint in &daemon.endpoints {
        let (address, served) = (endpoint.address(), endpoint.served());
        if served.metrics {
            let _ = writeln!(out, "posternd: metrics on http://{address}/metrics");
        }
        if served.page {
            let _ = writeln!(out, "posternd: page on http://{address}/");
        }
    }
    let _ = out.flush();
    drop(out);
    let (stop, stopped) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        next().await;
        let _ = stop.send(());
        next().await;
        log("stopped at once", "second signal", "what was in flight may or may not be done");
        std::process::exit(1);
    });
    let stop = async {
        let _ = stopped.await;
    };
    daemon.serve(listener, stop).await
}
