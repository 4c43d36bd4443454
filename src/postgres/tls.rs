//! TLS as libpq understands it: whom each `sslmode` trusts.
//!
//! Shell: reads certificates and keys from files. The verification itself is rustls's; what is ours is
//! which part of it each mode asks for.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls_platform_verifier::Verifier as PlatformVerifier;
use sha2::Digest as _;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use tokio_rustls::rustls::crypto::{
    CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature,
};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::ParsedCertificate;
use tokio_rustls::rustls::{
    ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, SignatureScheme,
};

use super::conninfo::{ConnInfo, RootCert, SslMode};

/// Builds what the handshake needs. The error says which file or setting is wrong and why.
///
/// As with libpq a root certificate that is there is used by every mode: `require` then checks the chain
/// like `verify-ca`. Without one, only the `verify-` modes insist.
pub(super) fn client_config(info: &ConnInfo) -> Result<ClientConfig, String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mode = info.ssl_mode();
    let verifier: Arc<dyn ServerCertVerifier> = match info.ssl_root_cert() {
        Some(RootCert::System) if mode != SslMode::VerifyFull => {
            return Err("`sslrootcert=system` goes with `sslmode=verify-full` only".to_owned());
        }
        Some(RootCert::System) => {
            let verifier = PlatformVerifier::new(Arc::clone(&provider));
            Arc::new(verifier.map_err(|error| format!("this machine's root certificates: {error}"))?)
        }
        given => {
            let file = match given {
                Some(RootCert::File(file)) => Some(file.clone()),
                _ => info.in_postgresql_directory("root.crt"),
            };
            match file {
                Some(file) if file.exists() => {
                    Arc::new(RootVerifier::read(&file, mode, Arc::clone(&provider))?)
                }
                file if matches!(mode, SslMode::VerifyCa | SslMode::VerifyFull) => {
                    let missing = file.map(|file| format!(": `{}` does not exist", file.display()));
                    let missing = missing.unwrap_or_default();
                    return Err(format!("no root certificate to verify the server with{missing}"));
                }
                _ => Arc::new(EncryptionOnly(Arc::clone(&provider))),
            }
        }
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match client_certificate(info)? {
        Some((chain, key)) => builder
            .with_client_auth_cert(chain, key)
            .map_err(|error| format!("client certificate: {error}"))?,
        None => builder.with_no_client_auth(),
    };
    config.enable_sni = info.ssl_sni();
    Ok(config)
}

type ClientCertificate = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// The certificate and key given, else those in `~/.postgresql` if they exist.
fn client_certificate(info: &ConnInfo) -> Result<Option<ClientCertificate>, String> {
    let or_default = |given: Option<&Path>, file| match given {
        Some(given) => Some(given.to_owned()),
        None => info.in_postgresql_directory(file).filter(|path| path.exists()),
    };
    let Some(certificate) = or_default(info.ssl_cert(), "postgresql.crt") else { return Ok(None) };
    let key: PathBuf = or_default(info.ssl_key(), "postgresql.key")
        .ok_or_else(|| format!("client certificate `{}` has no key: set `sslkey`", certificate.display()))?;
    let chain = read_certificates(&certificate)?;
    let wrong = |reason: &str| format!("client key `{}`: {reason}", key.display());
    let metadata = fs::metadata(&key).map_err(|error| wrong(&error.to_string()))?;
    // As libpq: root's own keys may be readable by a group.
    let forbidden = if metadata.uid() == 0 { 0o027 } else { 0o077 };
    if metadata.permissions().mode() & forbidden != 0 {
        return Err(wrong("others may read it; its permissions must be 0600, or 0640 if root owns it"));
    }
    let key = PrivateKeyDer::from_pem_file(&key).map_err(|error| match info.ssl_password() {
        Some(_) => wrong("encrypted keys are not supported; store it without a passphrase"),
        None => wrong(&error.to_string()),
    })?;
    Ok(Some((chain, key)))
}

fn read_certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let wrong = |reason: String| format!("certificate `{}`: {reason}", file.display());
    let certificates: Vec<_> = CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect)
        .map_err(|error| wrong(error.to_string()))?;
    if certificates.is_empty() { Err(wrong("no certificate in it".to_owned())) } else { Ok(certificates) }
}

/// Trusts the certificates of one file, with or without a look at the server's name.
#[derive(Debug)]
struct RootVerifier {
    roots: RootCertStore,
    /// The certificates themselves: a server may present one of them as its own, as self-signed ones do.
    listed: Vec<CertificateDer<'static>>,
    matches_name: bool,
    provider: Arc<CryptoProvider>,
}

impl RootVerifier {
    fn read(file: &Path, mode: SslMode, provider: Arc<CryptoProvider>) -> Result<Self, String> {
        let listed = read_certificates(file)?;
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(listed.iter().cloned());
        if added == 0 {
            return Err(format!("certificate `{}`: none in it can be used", file.display()));
        }
        Ok(Self { roots, listed, matches_name: mode == SslMode::VerifyFull, provider })
    }
}

impl ServerCertVerifier for RootVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        // The usual chain check refuses a certificate authority as a server's certificate, which is what a
        // self-signed one is. Presented by a server that holds its key, it is as good as its entry here.
        if !self.listed.contains(end_entity) {
            verify_server_cert_signed_by_trust_anchor(
                &certificate,
                &self.roots,
                intermediates,
                now,
                self.provider.signature_verification_algorithms.all,
            )?;
        }
        if self.matches_name {
            verify_server_name(&certificate, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Trusts every certificate: `sslmode=require` and below without a root certificate. Keeps listeners out,
/// not impostors.
#[derive(Debug)]
struct EncryptionOnly(Arc<CryptoProvider>);

impl ServerCertVerifier for EncryptionOnly {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }

    // That the server holds the key of the certificate it shows is checked even here: the password
    // exchange may be bound to that certificate.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// The channel binding `tls-server-end-point` (RFC 5929): the certificate's digest by the hash of its own
/// signature, SHA-256 in place of MD5 and SHA-1. `None` for signatures that have no such hash.
pub(super) fn server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    const RSA: &[u8] = &[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01];
    const ECDSA_SHA2: &[u8] = &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x03];
    const ECDSA_SHA1: &[u8] = &[0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x04, 0x01];
    // Certificate ::= SEQUENCE { tbsCertificate SEQUENCE, signatureAlgorithm SEQUENCE { OID, … }, … }
    let (certificate_body, _) = der_value(certificate, 0x30)?;
    let (_, after_tbs) = der_value(certificate_body, 0x30)?;
    let (algorithm, _) = der_value(after_tbs, 0x30)?;
    let (oid, _) = der_value(algorithm, 0x06)?;
    let (family, last) = oid.split_at_checked(oid.len().checked_sub(1)?)?;
    Some(match (family, last) {
        // MD5, SHA-1 and SHA-256 with RSA; ECDSA with SHA-1 and SHA-256.
        (RSA, [4 | 5 | 11]) | (ECDSA_SHA2, [2]) => sha2::Sha256::digest(certificate).to_vec(),
        (RSA, [12]) | (ECDSA_SHA2, [3]) => sha2::Sha384::digest(certificate).to_vec(),
        (RSA, [13]) | (ECDSA_SHA2, [4]) => sha2::Sha512::digest(certificate).to_vec(),
        _ if oid == ECDSA_SHA1 => sha2::Sha256::digest(certificate).to_vec(),
        _ => return None,
    })
}

/// The content of the DER element at the start of `input`, and what follows it.
fn der_value(input: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = input.split_first()?;
    let (&first, rest) = rest.split_first()?;
    if found != tag {
        return None;
    }
    let (length, rest) = match first {
        0..=0x7F => (usize::from(first), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first - 0x80))?;
            (digits.iter().fold(0, |length, &digit| length << 8 | usize::from(digit)), rest)
        }
        _ => return None,
    };
    rest.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn der(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = u16::try_from(content.len()).unwrap();
        let mut out = vec![tag, 0x82];
        out.extend(length.to_be_bytes());
        out.extend(content);
        out
    }

    fn certificate(oid: &[u8]) -> Vec<u8> {
        let algorithm = der(0x30, &der(0x06, oid));
        der(0x30, &[der(0x30, &[1; 300]), algorithm, der(0x03, &[0; 64])].concat())
    }

    #[test]
    fn the_end_point_follows_the_certificates_own_hash() {
        let rsa = |last| certificate(&[0x2A, 0x86, 0x48, 0x86, 0xF7, 0x0D, 0x01, 0x01, last]);
        for (certificate, length) in [(rsa(5), 32), (rsa(11), 32), (rsa(12), 48), (rsa(13), 64)] {
            assert_eq!(server_end_point(&certificate).unwrap().len(), length);
        }
        assert_eq!(server_end_point(&certificate(&[0x2B, 0x65, 0x70])), None, "Ed25519");
    }

    proptest! {
        #[test]
        fn no_certificate_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = server_end_point(&bytes);
        }
    }
}
