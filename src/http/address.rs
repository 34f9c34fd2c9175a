//! A client's address: the peer's, or what proxies that are trusted say of it.

use std::net::{IpAddr, SocketAddr};

use axum::http::HeaderMap;
use ipnet::IpNet;

/// The one header that is read; `Forwarded` (RFC 7239) is not.
const FORWARDED_FOR: &str = "x-forwarded-for";

/// Whom a request came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClientAddress(pub(super) IpAddr);

/// The right-most address that no trusted proxy has. Each proxy adds at the right whom it heard, so what stands left
/// of an untrusted one is that one's word, and so is whatever is no address.
pub(super) fn client_address(peer: IpAddr, headers: &HeaderMap, trusted: &[IpNet]) -> ClientAddress {
    let is_trusted = |address: &IpAddr| trusted.iter().any(|net| net.contains(address));
    let mut client = peer.to_canonical();
    let values: Vec<&str> = headers.get_all(FORWARDED_FOR).iter().map(|value| value.to_str().unwrap_or("?")).collect();
    for hop in values.iter().rev().flat_map(|value| value.rsplit(',')) {
        if !is_trusted(&client) {
            break;
        }
        let Some(before) = parse(hop.trim()) else { break };
        client = before;
    }
    ClientAddress(client)
}

/// An address, with or without a port.
fn parse(hop: &str) -> Option<IpAddr> {
    let bare = hop.strip_prefix('[').and_then(|hop| hop.strip_suffix(']')).unwrap_or(hop);
    let address = bare.parse().ok().or_else(|| hop.parse().ok().map(|socket: SocketAddr| socket.ip()));
    address.map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    fn client(peer: &str, forwarded: &[&str], trusted: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for value in forwarded {
            headers.append(FORWARDED_FOR, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        let trusted: Vec<IpNet> = trusted.iter().map(|net| net.parse().unwrap()).collect();
        client_address(peer.parse().unwrap(), &headers, &trusted).0.to_string()
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        let nets = ["10.0.0.0/8", "2001:db8::/32"];
        for (peer, forwarded, expected) in [
            ("192.0.2.1", vec![], "192.0.2.1"),
            ("192.0.2.1", vec!["198.51.100.7"], "192.0.2.1"),
            ("10.0.0.1", vec![], "10.0.0.1"),
            ("10.0.0.1", vec!["198.51.100.7"], "198.51.100.7"),
            ("::ffff:10.0.0.1", vec!["198.51.100.7"], "198.51.100.7"),
            ("10.0.0.1", vec!["6.6.6.6, 198.51.100.7"], "198.51.100.7"),
            ("10.0.0.1", vec!["6.6.6.6", "198.51.100.7"], "198.51.100.7"),
            ("10.0.0.1", vec!["198.51.100.7, 10.0.0.2,10.0.0.3"], "198.51.100.7"),
            ("10.0.0.1", vec!["198.51.100.7", "10.0.0.2"], "198.51.100.7"),
            ("10.0.0.1", vec!["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
            ("10.0.0.1", vec!["198.51.100.7:4711"], "198.51.100.7"),
            ("2001:db8::1", vec!["[2a00::1]:443"], "2a00::1"),
            ("2001:db8::1", vec!["[2a00::1]"], "2a00::1"),
            ("10.0.0.1", vec!["6.6.6.6, unknown"], "10.0.0.1"),
            ("10.0.0.1", vec!["6.6.6.6, _hidden, 10.0.0.2"], "10.0.0.2"),
            ("10.0.0.1", vec![""], "10.0.0.1"),
            ("10.0.0.1", vec!["6.6.6.6,"], "10.0.0.1"),
            ("10.0.0.1", vec!["\u{e9}"], "10.0.0.1"),
        ] {
            assert_eq!(client(peer, &forwarded, &nets), expected, "{peer} {forwarded:?}");
        }
        assert_eq!(client("10.0.0.1", &["198.51.100.7"], &[]), "10.0.0.1");
    }

    proptest! {
        /// Whatever a client writes itself, its own address is what the trusted proxy adds behind it.
        #[test]
        fn a_client_cannot_choose_its_address(lie in "[ -~]{0,80}") {
            prop_assert_eq!(client("10.0.0.1", &[&format!("{lie}, 198.51.100.7")], &["10.0.0.0/8"]), "198.51.100.7");
            prop_assert_eq!(client("10.0.0.1", &[&lie, "198.51.100.7"], &["10.0.0.0/8"]), "198.51.100.7");
        }
    }
}
