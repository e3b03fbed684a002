"""Settings of webhooks."""

import ipaddress
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

from svc.settings.section import AbsolutePath, Section


def _webhook_url(text: str) -> str:
    url = urlsplit(text)
    host = url.hostname or ""
    if url.scheme not in ("http", "https") or not host or url.fragment or "@" in url.netloc or url.port == 0:
        raise ValueError("must be the URL of a webhook, such as https://host/path")
    if url.scheme == "http" and host != "localhost" and not _is_loopback_address(host):
        raise ValueError("the messages would be sent unencrypted; use https")
    return text


def _is_loopback_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class WebhookSettings(Section):
    """Settings of a webhook that is notified about rollouts."""

    url: Annotated[str, AfterValidator(_webhook_url)]
    """URL to which messages about rollouts are posted; https, or http on this machine."""
    secret_file: AbsolutePath
    """File with the secrets that sign the messages, each `whsec_` followed by base64; readable by its owner only."""
