//! Where metrics and the page are served: HTTP/1.1, `GET` only, one answer to a connection.
//!
//! Holds: it listens only where the operator said, and answers only what is served there; who asks
//! from another machine needs the token for all that was measured (the page's own files are no
//! secret); a peer that sends too much, too slowly or nonsense is answered
//! or dropped and holds nobody up: at most 16 are served at once, each for at most
//! 10 seconds. Does not hold: secrecy of the answers on their way; use a tunnel.

use std::net::{SocketAddr, TcpListener as StdListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::daemon::Daemon;
use crate::metrics::{Format, exposed};
use crate::problem::{Problem, log};
use crate::web;

/// Most connections that are served at once; further ones wait in the kernel.
const MOST_PEERS: usize = 16;
/// Longest time for one connection.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest head of a request, bytes, and most headers in it.
const MOST_HEAD: usize = 8 << 10;
const MOST_HEADERS: usize = 64;
/// Shortest token, bytes.
const LEAST_TOKEN: usize = 16;

/// Where and to whom metrics and the page are served.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Metrics and the page")]
pub struct EndpointOptions {
    /// Serves metrics to Prometheus at http://ADDRESS/metrics, for example 127.0.0.1:9464. An
    /// address that is not loopback needs --metrics-token-file.
    #[arg(long = "metrics", value_name = "ADDRESS")]
    pub address: Option<SocketAddr>,
    /// Serves a page for a browser at http://ADDRESS/: latency over time, stages, slow requests. It
    /// may be the address of the metrics. One that is not loopback needs --web-token-file.
    #[arg(long, value_name = "ADDRESS")]
    pub web: Option<SocketAddr>,
    /// Serves what was measured only to those who send the token in FILE (16 characters or more) as
    /// `Authorization: Bearer TOKEN`; the page asks for it.
    #[arg(long = "metrics-token-file", visible_alias = "web-token-file", value_name = "FILE")]
    pub token_file: Option<std::path::PathBuf>,
}

/// What is served at an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// `/metrics`.
    pub metrics: bool,
    /// The page.
    pub page: bool,
}

impl Served {
    /// The option that asked for it.
    const fn option(self) -> &'static str {
        if self.metrics { "metrics" } else { "web" }
    }
}

/// A bound endpoint.
#[derive(Debug)]
pub struct Endpoint {
    listener: TcpListener,
    address: SocketAddr,
    served: Served,
    token: Option<Vec<u8>>,
}

impl Endpoint {
    /// Binds the endpoints that the options ask for; one where both are asked for at one address.
    /// `succeed`: another daemon may have the address still. Needs a tokio runtime around it.
    ///
    /// # Errors
    /// A [`Problem`] for the operator: an address that is in use or needs a token, a token file that
    /// holds none.
    pub fn bind(options: &EndpointOptions, succeed: bool) -> Result<Vec<Self>, Problem> {
        let EndpointOptions { address, web, token_file } = options;
        if let (Some(file), None, None) = (token_file, address, web) {
            return Err(Problem::config(
                "a token, and nothing is served",
                file.display(),
                "say where with --metrics or --web",
            ));
        }
        let token = token_file.as_deref().map(read_token).transpose()?;
        let (metrics, page) =
            (Served { metrics: true, page: false }, Served { metrics: false, page: true });
        let wanted = match (*address, *web) {
            (Some(one), Some(other)) if one == other => {
                vec![(one, Served { metrics: true, page: true })]
            }
            (one, other) => {
                let one = one.map(|address| (address, metrics));
                one.into_iter().chain(other.map(|address| (address, page))).collect()
            }
        };
        let bound = wanted.into_iter();
        bound.map(|(address, served)| Self::at(address, served, token.clone(), succeed)).collect()
    }

    fn at(
        address: SocketAddr,
        served: Served,
        token: Option<Vec<u8>>,
        succeed: bool,
    ) -> Result<Self, Problem> {
        let option = served.option();
        if token.is_none() && !address.ip().is_loopback() {
            return Err(Problem::config(
                format_args!("--{option} for other machines needs a token"),
                address,
                &format!(
                    "name one with --{option}-token-file, or use an address like 127.0.0.1:9464"
                ),
            ));
        }
        let listener = listen(address, succeed).map_err(|e| {
            Problem::config(
                format_args!("nothing can be served ({e})"),
                address,
                &format!("name a free address of this machine with --{option}"),
            )
        })?;
        let address = listener.local_addr().unwrap_or(address);
        Ok(Self { listener, address, served, token })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// What is served there.
    #[must_use]
    pub const fn served(&self) -> Served {
        self.served
    }

    /// Serves for ever.
    pub async fn serve(&self, daemon: Arc<Daemon>) {
        let peers = Arc::new(Semaphore::new(MOST_PEERS));
        loop {
            let Ok(permit) = Arc::clone(&peers).acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let (daemon, token) = (Arc::clone(&daemon), self.token.clone());
                    let served = self.served;
                    tokio::spawn(async move {
                        let answered = answer(stream, daemon, served, token);
                        // A peer that is gone or too slow has nobody to be told to.
                        let _ = tokio::time::timeout(PATIENCE, answered).await;
                        drop(permit);
                    });
                }
                Err(e) => {
                    log(format_args!("accept failed ({e})"), self.address, "it is tried again");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

/// A daemon that takes another's place shares its address until that one has ended: both have said
/// that they share.
fn listen(address: SocketAddr, succeed: bool) -> std::io::Result<TcpListener> {
    if !succeed && address.port() != 0 {
        // Somebody who shares it is in the way, too.
        drop(StdListener::bind(address)?);
    }
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, 64)?;
    TcpListener::from_std(socket.into())
}

fn read_token(path: &Path) -> Result<Vec<u8>, Problem> {
    let unusable = |why: &dyn std::fmt::Display| {
        Problem::config(
            format_args!("no token for metrics ({why})"),
            path.display(),
            &format!("write a line of {LEAST_TOKEN} characters or more there"),
        )
    };
    let text = std::fs::read_to_string(path).map_err(|e| unusable(&e))?;
    let token = text.trim();
    if token.len() < LEAST_TOKEN || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(unusable(&"it is too short, or has characters that a header can not carry"));
    }
    Ok(token.as_bytes().to_vec())
}

/// Why a request gets nothing: status and reason.
type Refusal = &'static str;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Metrics(Format),
    Page(web::Wish),
}

async fn answer(
    mut stream: TcpStream,
    daemon: Arc<Daemon>,
    served: Served,
    token: Option<Vec<u8>>,
) -> std::io::Result<()> {
    let Some(head) = read_head(&mut stream).await? else {
        return respond(&mut stream, "431 Request Header Fields Too Large", "text/plain", b"")
            .await;
    };
    let (content_type, made) = match judge(&head, served, token.as_deref()) {
        Ok(Wish::Page(web::Wish::File(file))) => {
            return respond(&mut stream, "200 OK", file.content_type, file.text.as_bytes()).await;
        }
        Ok(Wish::Page(wish)) => {
            if wish == web::Wish::Snapshot {
                daemon.sessions.settle().await;
            }
            let make = move || web::text(&daemon.sessions, &daemon.source, wish).into_bytes();
            ("application/json", tokio::task::spawn_blocking(make))
        }
        Ok(Wish::Metrics(format)) => {
            daemon.sessions.settle().await;
            let make = move || exposed(&daemon.sessions, &daemon.source, format);
            (format.content_type(), tokio::task::spawn_blocking(make))
        }
        Err(refusal) => {
            let said = format!("{refusal}\n");
            return respond(&mut stream, refusal, "text/plain", said.as_bytes()).await;
        }
    };
    let body = made.await.map_err(std::io::Error::other)?;
    respond(&mut stream, "200 OK", content_type, &body).await
}

/// The head of a request; `None` if it is too long.
async fn read_head(stream: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut head = Vec::new();
    let mut chunk = [0; 1024];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let count = stream.read(&mut chunk).await?;
        if count == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        head.extend_from_slice(&chunk[..count]);
        if head.len() > MOST_HEAD {
            return Ok(None);
        }
    }
    Ok(Some(head))
}

/// Whether a request gets what it asks for.
fn judge(head: &[u8], served: Served, token: Option<&[u8]>) -> Result<Wish, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    if !request.parse(head).is_ok_and(|status| status.is_complete()) {
        return Err("400 Bad Request");
    }
    let header = |name: &str| {
        let mut all = request.headers.iter();
        all.find(|header| header.name.eq_ignore_ascii_case(name)).map(|header| header.value)
    };
    let (path, query) =
        request.path.map_or(("", ""), |path| path.split_once('?').unwrap_or((path, "")));
    let page = web::Wish::of(path, query).filter(|_| served.page);
    match token {
        // A page that could not be shown could not ask for the token.
        Some(_) if matches!(page, Some(web::Wish::File(_))) => {}
        Some(token) => {
            let sent = header("authorization").and_then(|value| value.strip_prefix(b"Bearer "));
            if !sent.is_some_and(|sent| is_same(sent, token)) {
                return Err("401 Unauthorized");
            }
        }
        // A page of the web that has its name lead here may not read along in a browser.
        None if !header("host").is_some_and(is_local) => return Err("403 Forbidden"),
        None => {}
    }
    if request.method != Some("GET") {
        return Err("405 Method Not Allowed");
    }
    if served.metrics && path == "/metrics" {
        let accept = header("accept").unwrap_or_default();
        return Ok(Wish::Metrics(Format::asked_for(&String::from_utf8_lossy(accept))));
    }
    page.map(Wish::Page).ok_or("404 Not Found")
}

/// Compares without telling by its time where the difference is.
fn is_same(sent: &[u8], token: &[u8]) -> bool {
    let differences = sent.iter().zip(token).fold(0, |all, (a, b)| all | (a ^ b));
    sent.len() == token.len() && differences == 0
}

/// Whether a `Host` header names this machine by a loopback address or as `localhost`.
fn is_local(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    let address = host.parse::<SocketAddr>().map(|address| address.ip());
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let address = address.or_else(|_| bare.parse());
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    name == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

async fn respond(
    stream: &mut TcpStream,
    status: &str,
    content_type: &str,
    body: &[u8],
) -> std::io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\
         Connection: close\r\nCache-Control: no-store\r\nContent-Security-Policy: {}\r\n\
         X-Content-Type-Options: nosniff\r\nCross-Origin-Resource-Policy: same-origin\r\n\
         Referrer-Policy: no-referrer\r\n\r\n",
        body.len(),
        postern_page::POLICY
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "Host: 127.0.0.1:9464\r\n";

    const BOTH: Served = Served { metrics: true, page: true };

    fn ask_at(
        served: Served,
        line: &str,
        headers: &str,
        token: Option<&[u8]>,
    ) -> Result<Wish, Refusal> {
        judge(format!("{line} HTTP/1.1\r\n{headers}\r\n").as_bytes(), served, token)
    }

    fn ask(line: &str, headers: &str, token: Option<&[u8]>) -> Result<Wish, Refusal> {
        ask_at(Served { metrics: true, page: false }, line, headers, token)
    }

    #[test]
    fn each_address_serves_what_was_asked_for_there() {
        let page = Served { metrics: false, page: true };
        for (served, metrics, shown) in [
            (BOTH, true, true),
            (page, false, true),
            (Served { metrics: true, page: false }, true, false),
        ] {
            let ok = |line| ask_at(served, line, HOST, None).is_ok();
            assert_eq!(ok("GET /metrics"), metrics);
            for line in ["GET /", "GET /app.js", "GET /api/snapshot", "GET /api/records?first=1"] {
                assert_eq!(ok(line), shown, "{line}");
            }
            assert!(!ok("GET /api") && !ok("GET /other.js") && !ok("POST /"));
            assert_eq!(
                ask_at(served, "GET /", "Host: evil.example\r\n", None),
                Err("403 Forbidden")
            );
        }
    }

    #[test]
    fn with_a_token_the_pages_files_are_open_and_what_was_measured_is_not() {
        let token = Some(&b"0123456789abcdef"[..]);
        for line in ["GET /", "GET /app.js", "GET /style.css"] {
            assert!(ask_at(BOTH, line, "", token).is_ok(), "{line}");
        }
        for line in ["GET /api/snapshot", "GET /api/records", "GET /metrics", "GET /none"] {
            assert_eq!(ask_at(BOTH, line, HOST, token), Err("401 Unauthorized"), "{line}");
        }
        let with = "Authorization: Bearer 0123456789abcdef\r\n";
        assert!(ask_at(BOTH, "GET /api/snapshot", with, token).is_ok());
    }

    #[test]
    fn only_get_of_metrics_is_answered() {
        assert_eq!(ask("GET /metrics", HOST, None), Ok(Wish::Metrics(Format::Plain)));
        assert_eq!(ask("GET /metrics?x=1", HOST, None), Ok(Wish::Metrics(Format::Plain)));
        let accept = format!("{HOST}accept: application/openmetrics-text;version=1.0.0\r\n");
        assert_eq!(ask("GET /metrics", &accept, None), Ok(Wish::Metrics(Format::OpenMetrics)));
        assert_eq!(ask("GET /", HOST, None), Err("404 Not Found"));
        assert_eq!(ask("POST /metrics", HOST, None), Err("405 Method Not Allowed"));
        assert_eq!(judge(b"\x16\x03\x01 nonsense\r\n\r\n", BOTH, None), Err("400 Bad Request"));
        let many = HOST.repeat(MOST_HEADERS + 1);
        assert_eq!(ask("GET /metrics", &many, None), Err("400 Bad Request"));
    }

    #[test]
    fn with_a_token_only_the_token_opens() {
        let token = Some(&b"0123456789abcdef"[..]);
        let with = |value: &str| {
            ask("GET /metrics", &format!("Authorization: {value}\r\n"), token).is_ok()
        };
        assert!(with("Bearer 0123456789abcdef"));
        for wrong in ["Bearer 0123456789abcdeF", "Bearer 0123456789abcde", "Bearer ", "Basic x", ""]
        {
            assert!(!with(wrong), "{wrong}");
        }
        assert_eq!(ask("GET /metrics", HOST, token), Err("401 Unauthorized"));
    }

    #[test]
    fn without_a_token_only_who_means_this_machine_is_answered() {
        for (host, local) in [
            ("localhost", true),
            ("localhost:9464", true),
            ("127.0.0.1", true),
            ("127.9.9.9:80", true),
            ("[::1]:9464", true),
            ("[::1]", true),
            ("evil.example:9464", false),
            ("localhost.evil.example", false),
            ("10.0.0.1:9464", false),
            ("", false),
        ] {
            assert_eq!(is_local(host.as_bytes()), local, "{host}");
        }
        assert_eq!(ask("GET /metrics", "", None), Err("403 Forbidden"));
    }
}
