//! A daemon in this process, on a thread of its own.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use clap::Parser;
use posternd::activation::Manager;
use posternd::daemon::{Daemon, Options};
use posternd::endpoint::Endpoint;
use posternd::problem::Problem;

pub struct InProcess {
    pub socket: PathBuf,
    /// Where it serves metrics or the page, if it does.
    pub metrics: Option<SocketAddr>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<Result<(), Problem>>>,
}

impl InProcess {
    /// Starts a daemon with its socket in `directory` and these further arguments.
    pub fn start(directory: &Path, arguments: &[&str]) -> Self {
        Self::try_start(directory, arguments).expect("daemon")
    }

    pub fn try_start(directory: &Path, arguments: &[&str]) -> Result<Self, Problem> {
        let socket = directory.join("control");
        let first = ["posternd", "--no-probes", "--socket", socket.to_str().unwrap()];
        let options = Options::parse_from(first.iter().chain(arguments));
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (ready, started) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                match Daemon::start(&options, &Manager::default()) {
                    Ok((daemon, listener)) => {
                        let metrics = daemon.endpoints.first().map(Endpoint::address);
                        ready.send(Ok(metrics)).unwrap();
                        let stop = async {
                            let _ = stopped.await;
                        };
                        daemon.serve(listener, stop).await
                    }
                    Err(problem) => {
                        ready.send(Err(problem)).unwrap();
                        Ok(())
                    }
                }
            })
        });
        let metrics = started.recv().unwrap()?;
        Ok(Self { socket, metrics, stop: Some(stop), thread: Some(thread) })
    }

    /// Stops it gracefully.
    pub fn stop(mut self) -> Result<(), Problem> {
        let _ = self.stop.take().map(|stop| stop.send(()));
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        let _ = self.stop.take().map(|stop| stop.send(()));
        if let Some(thread) = self.thread.take()
            && !std::thread::panicking()
        {
            let _ = thread.join();
        }
    }
}
