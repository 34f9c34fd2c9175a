//! Who may ask a broker without tokens: this machine's own programs and pages.
//!
//! Such a broker listens on loopback only, but a page of any site can be made to reach it: the site's name is pointed at
//! 127.0.0.1, and the browser takes the answers for the site's own (DNS rebinding). The name that was asked for gives it away.

use std::net::IpAddr;

use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, header};

/// What is let in besides loopback's names.
#[derive(Debug, Clone, Default)]
pub struct Local {
    /// Other names that the broker is reached under: that of `LFS_BROKER_PUBLIC_URL`.
    pub hosts: Vec<String>,
    /// `LFS_BROKER_CORS_ORIGINS`: pages of elsewhere that may ask.
    pub origins: Vec<String>,
}

impl Local {
    /// Whether a request names this machine, and comes from no page of elsewhere.
    pub(super) fn lets_in(&self, request: &Parts) -> bool {
        let hosts = request.headers.get_all(header::HOST).iter().map(|host| host.to_str().unwrap_or("?"));
        let mut hosts = hosts.chain(request.uri.authority().map(Authority::as_str));
        hosts.all(|host| is_loopback(host) || self.is_own(host)) && self.is_own_page(&request.headers)
    }

    fn is_own(&self, authority: &str) -> bool {
        name(authority).is_some_and(|name| self.hosts.iter().any(|host| host.eq_ignore_ascii_case(name)))
    }

    fn is_own_page(&self, headers: &HeaderMap) -> bool {
        headers.get_all(header::ORIGIN).iter().all(|origin| {
            let origin = origin.to_str().unwrap_or("?");
            let authority = origin.split_once("://").map(|(_, authority)| authority);
            self.origins.iter().any(|allowed| allowed == "*" || allowed == origin)
                || authority.is_some_and(|authority| is_loopback(authority) || self.is_own(authority))
        })
    }
}

/// Whether `name:port` is loopback's: its addresses, `localhost`, and the names below it, which resolve to it (RFC 6761).
pub(crate) fn is_loopback(authority: &str) -> bool {
    let Some(name) = name(authority) else { return false };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    match name.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => name == "localhost" || name.ends_with(".localhost"),
    }
}

/// The name of an authority, without its port.
fn name(authority: &str) -> Option<&str> {
    let (name, port) = match authority.rfind(':') {
        Some(colon) if !authority.ends_with(']') => (&authority[..colon], &authority[colon + 1..]),
        _ => (authority, ""),
    };
    (!name.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::Request;
    use proptest::prelude::*;

    fn lets_in(local: &Local, host: &str, origin: Option<&str>) -> bool {
        let mut request = Request::get("/").header("host", host);
        if let Some(origin) = origin {
            request = request.header("origin", origin);
        }
        local.lets_in(&request.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn only_names_of_this_machine_and_its_pages_are_let_in() {
        let none = Local::default();
        for host in
            ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "127.9.9.9", "[::1]:80", "[::1]", "a.localhost:1", "localhost."]
        {
            assert!(lets_in(&none, host, None), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8080",
            "0.0.0.0:8080",
            "10.0.0.1",
            "127.0.0.1.evil.example",
            "localhost.evil",
            "",
            "127.0.0.1:80@evil.example",
            "[::2]",
            "localhost:8080:9",
            "xlocalhost",
            "8080",
            ":8080",
        ] {
            assert!(!lets_in(&none, host, None), "{host}");
        }
        for (origin, wanted) in [
            ("http://localhost:3000", true),
            ("http://127.0.0.1:8080", true),
            ("http://[::1]", true),
            ("https://evil.example", false),
            ("null", false),
            ("http://localhost.evil", false),
            ("", false),
        ] {
            assert_eq!(lets_in(&none, "localhost", Some(origin)), wanted, "{origin}");
        }
        let some = Local { hosts: vec!["lfs.example".to_owned()], origins: vec!["https://app.example".to_owned()] };
        assert!(
            lets_in(&some, "LFS.example:443", Some("https://app.example"))
                && lets_in(&some, "lfs.example", Some("https://lfs.example"))
        );
        assert!(!lets_in(&some, "lfs.example", Some("https://evil.example")) && !lets_in(&some, "app.example", None));
        let any = Local { origins: vec!["*".to_owned()], ..Local::default() };
        assert!(lets_in(&any, "localhost", Some("null")) && !lets_in(&any, "evil.example", None));
    }

    proptest! {
        #[test]
        fn no_host_makes_it_panic(host in "\\PC{0,40}") {
            let _ = is_loopback(&host);
        }
    }
}
