//! A counter in etcd 3: one key, changed by transactions that compare its value.
//!
//! Talks to the JSON gateway of etcd's v3 API (`/v3/kv/range`, `/v3/kv/txn`,
//! `/v3/auth/authenticate`), with TLS, client certificates and users. Reads are linearizable, which
//! is etcd's default. Of several endpoints each is asked once until one answers: a transaction that
//! happened although its answer was lost shows in the next answer.
//!
//! Follows the etcd 3.4 API reference (api_grpc_gateway, rpc.proto).

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use postern_trusted::counter::{CounterError, Record, Swapped};
use serde_json::{Value, json};
use ureq::{
    Agent,
    tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem},
};

use super::{AccessArgs, Provider, Trouble, record_of, text_of};
use crate::error::{Exit, Failure};

/// Longest time for one question to one endpoint.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Largest answer that is read, in bytes.
const LARGEST: u64 = 64 << 10;
/// gRPC's code for credentials that are missing, wrong or no longer good.
const UNAUTHENTICATED: u64 = 16;
/// gRPC's code for a user who may not do that.
const PERMISSION_DENIED: u64 = 7;

/// The endpoints and the key in `URL[,URL...]/KEY`.
pub fn parse(text: &str) -> Option<(Vec<String>, String)> {
    let start = text.rfind("://")? + 3;
    let slash = start + text[start..].find('/')?;
    let (urls, key) = (&text[..slash], &text[slash + 1..]);
    let urls: Vec<String> = urls.split(',').map(str::to_owned).collect();
    let sound = |url: &String| {
        let host = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
        host.is_some_and(|host| !host.is_empty() && !host.contains(['/', '@', '?', '#', ' ']))
    };
    (!key.is_empty() && urls.iter().all(sound)).then(|| (urls, key.to_owned()))
}

struct Login {
    name: String,
    password: zeroize::Zeroizing<String>,
}

pub struct EtcdCounter {
    urls: Vec<String>,
    key: String,
    agent: Agent,
    login: Option<Login>,
    token: Mutex<Option<String>>,
}

impl EtcdCounter {
    pub fn new(urls: Vec<String>, key: String, access: &AccessArgs) -> Result<Self, Failure> {
        let clear: Option<&String> = urls.iter().find(|url| url.starts_with("http://"));
        if let Some(url) = clear.filter(|url| !is_here(url)) {
            eprintln!(
                "postern: the counter at {url} is asked without TLS: whoever is on the way can \
                 answer in its name"
            );
        }
        let mut tls = TlsConfig::builder();
        if let Some(path) = &access.counter_ca {
            let (certificates, _) = read_pem(path)?;
            tls = tls.root_certs(RootCerts::new_with_certs(&certificates));
        }
        if let Some(path) = &access.counter_cert {
            let (certificates, key) = read_pem(path)?;
            let key = key.ok_or_else(|| bad_file(path, "no private key in the file"))?;
            tls = tls.client_cert(Some(ClientCert::new_with_certs(&certificates, key)));
        }
        let config = Agent::config_builder()
            .tls_config(tls.build())
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .build();
        let login = access.counter_login.as_deref().map(read_login).transpose()?;
        Ok(Self { urls, key, agent: config.new_agent(), login, token: Mutex::default() })
    }

    /// Asks the endpoints in turn until one answers.
    fn ask(&self, path: &str, question: &Value) -> Result<Value, Trouble> {
        let mut last = Trouble::new(CounterError::Unreachable, "no endpoint");
        for url in &self.urls {
            match self.ask_one(url, path, question) {
                Ok(answer) => return Ok(answer),
                Err(trouble) => last = trouble,
            }
        }
        Err(last)
    }

    fn ask_one(&self, url: &str, path: &str, question: &Value) -> Result<Value, Trouble> {
        for fresh in [false, true] {
            let token = self.token(url, fresh)?;
            let (status, answer) = self.post(url, path, question, token.as_deref())?;
            let code = answer["code"].as_u64().unwrap_or(0);
            if status == 200 && code == 0 {
                return Ok(answer);
            }
            let text = answer["error"].as_str().unwrap_or("no reason given");
            let stale = code == UNAUTHENTICATED || text.contains("invalid auth token");
            if stale && self.login.is_some() && !fresh {
                continue;
            }
            let refused = stale
                || code == PERMISSION_DENIED
                || text.contains("user name is empty")
                || text.contains("permission denied");
            let kind = if refused { CounterError::Refused } else { CounterError::Unreachable };
            return Err(Trouble::new(kind, format_args!("{url}: status {status}: {text}")));
        }
        Err(Trouble::new(CounterError::Refused, format_args!("{url}: the login does not last")))
    }

    /// The token of a login, if there is one.
    fn token(&self, url: &str, fresh: bool) -> Result<Option<String>, Trouble> {
        let Some(login) = &self.login else { return Ok(None) };
        let mut kept = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        if fresh || kept.is_none() {
            let question = json!({ "name": login.name, "password": *login.password });
            let (status, answer) = self.post(url, "/v3/auth/authenticate", &question, None)?;
            let Some(token) = answer["token"].as_str() else {
                let text = answer["error"].as_str().unwrap_or("no reason given");
                let text = format_args!("{url}: login: status {status}: {text}");
                return Err(Trouble::new(CounterError::Refused, text));
            };
            *kept = Some(token.to_owned());
        }
        Ok(kept.clone())
    }

    fn post(
        &self,
        url: &str,
        path: &str,
        question: &Value,
        token: Option<&str>,
    ) -> Result<(u16, Value), Trouble> {
        let unreachable = |error: &dyn core::fmt::Display| {
            Trouble::new(CounterError::Unreachable, format_args!("{url}: {error}"))
        };
        let mut request = self.agent.post(format!("{url}{path}")).content_type("application/json");
        if let Some(token) = token {
            request = request.header("Authorization", token);
        }
        let mut response = request.send(question.to_string()).map_err(|e| unreachable(&e))?;
        let status = response.status().as_u16();
        let body = response.body_mut().with_config().limit(LARGEST).read_to_string();
        let answer = serde_json::from_str(&body.map_err(|error| unreachable(&error))?);
        let malformed = |_| {
            let text = format_args!("{url}: status {status}: the answer is not JSON");
            Trouble::new(CounterError::Malformed, text)
        };
        Ok((status, answer.map_err(malformed)?))
    }
}

/// Whether a URL names this machine.
fn is_here(url: &str) -> bool {
    let host = url.trim_start_matches("http://");
    ["127.0.0.1", "localhost", "[::1]"].iter().any(|here| {
        host.strip_prefix(here).is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
    })
}

fn bad_file(path: &Path, what: impl core::fmt::Display) -> Failure {
    Failure::new(Exit::Usage, what, path.display(), "see `postern run --help`")
}

fn read_pem(
    path: &Path,
) -> Result<(Vec<Certificate<'static>>, Option<PrivateKey<'static>>), Failure> {
    let text = std::fs::read(path).map_err(|e| Failure::io("cannot read", path.display(), &e))?;
    let (mut certificates, mut key) = (Vec::new(), None);
    for item in parse_pem(&text) {
        match item.map_err(|error| bad_file(path, error))? {
            PemItem::Certificate(certificate) => certificates.push(certificate),
            PemItem::PrivateKey(private) => key = Some(private),
            _ => {}
        }
    }
    if certificates.is_empty() {
        return Err(bad_file(path, "no certificate in the file"));
    }
    Ok((certificates, key))
}

fn read_login(path: &Path) -> Result<Login, Failure> {
    let text = std::fs::read_to_string(path).map(zeroize::Zeroizing::new);
    let text = text.map_err(|error| Failure::io("cannot read", path.display(), &error))?;
    let (name, password) = text
        .trim_end_matches('\n')
        .split_once(':')
        .ok_or_else(|| bad_file(path, "not NAME:PASSWORD"))?;
    Ok(Login { name: name.into(), password: password.to_owned().into() })
}

/// Base64 (RFC 4648, section 4), which the gateway uses for bytes.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word = group.iter().fold(0_u32, |word, byte| word << 8 | u32::from(*byte))
            << (8 * (3 - group.len()));
        for n in 0..4 {
            let digit = (word >> (18 - 6 * n) & 63) as usize;
            text.push(if n <= group.len() { char::from(DIGITS[digit]) } else { '=' });
        }
    }
    text
}

fn from_base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=');
    let mut bytes = Vec::with_capacity(digits.len() * 3 / 4);
    let (mut word, mut bits) = (0_u32, 0);
    for digit in digits.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        word = word << 6 | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((word >> bits & 255) as u8);
        }
    }
    Some(bytes)
}

/// The record in the `kvs` of an answer.
fn held(answer: &Value) -> Result<Option<Record>, Trouble> {
    let Some(kv) = answer["kvs"].get(0) else { return Ok(None) };
    let bytes = kv["value"].as_str().and_then(from_base64);
    let text = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
    text.and_then(|text| record_of(&text))
        .map(Some)
        .ok_or_else(|| Trouble::new(CounterError::Malformed, "the key holds no record"))
}

impl Provider for EtcdCounter {
    fn load(&self) -> Result<Option<Record>, Trouble> {
        held(&self.ask("/v3/kv/range", &json!({ "key": base64(self.key.as_bytes()) }))?)
    }

    fn swap(&self, old: Option<Record>, new: Record) -> Result<Swapped, Trouble> {
        let key = base64(self.key.as_bytes());
        let compare = match old {
            Some(old) => json!({
                "key": key, "target": "VALUE", "result": "EQUAL",
                "value": base64(text_of(&old).as_bytes()),
            }),
            // A key that was never made.
            None => json!({
                "key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0",
            }),
        };
        let put = json!({ "key": key, "value": base64(text_of(&new).as_bytes()) });
        let answer = self.ask(
            "/v3/kv/txn",
            &json!({
                "compare": [compare],
                "success": [{ "request_put": put }],
                "failure": [{ "request_range": { "key": key } }],
            }),
        )?;
        if answer["succeeded"].as_bool() == Some(true) {
            return Ok(Swapped::Done);
        }
        held(&answer["responses"][0]["response_range"]).map(Swapped::Lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors of RFC 4648, section 10.
    #[test]
    fn base64_agrees_with_rfc_4648() {
        for (plain, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), text);
            assert_eq!(from_base64(text).as_deref(), Some(plain.as_bytes()));
        }
        assert_eq!(from_base64("a b"), None);
    }

    #[test]
    fn the_key_is_what_follows_the_last_authority() {
        let of = |text| parse(text).map(|(urls, key)| (urls.join(" "), key));
        assert_eq!(
            of("https://a:2379,https://b:2379/postern/data"),
            Some(("https://a:2379 https://b:2379".into(), "postern/data".into()))
        );
        assert_eq!(of("http://[::1]:2379/k"), Some(("http://[::1]:2379".into(), "k".into())));
        for bad in ["", "https://a", "https://a/", "a/k", "https:///k", "https://u@a/k", "x://a/k"]
        {
            assert_eq!(of(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_answer_without_a_record_is_nothing_or_malformed() {
        assert_eq!(held(&json!({})).unwrap(), None);
        assert_eq!(held(&json!({ "kvs": [] })).unwrap(), None);
        for value in [json!("Zm9v"), json!(7), json!("%"), Value::Null] {
            assert!(held(&json!({ "kvs": [{ "value": value }] })).is_err());
        }
    }
}
