# SPDX-License-Identifier: Apache-2.0
"""The table of status codes in Chinese, for docs/zh/errors.md: each text of it, by the English one.

A text that is missing here, and one that the table does not have any more, fail the test of the
page.
"""

from __future__ import annotations

HEAD = """# 错误

类型错误抛出 `TypeError`,数值超出位宽抛出 `ValueError`,与参考接口相同。
其他所有失败都是 `LLMException`。它有 `status_code`,在已知时还有 `op`、
`peer`、`cache_id` 和 `remedy`。它的文本给出错误的值、限制和补救办法(文本为英文)。
它的类由状态码决定,并且同时是 Python 的某个内置异常类:

```python
import llm_datadist_torch as ld

with ld.open() as node:
    try:
        node.connect("127.0.0.1:1", timeout_s=0.2)
    except ConnectionError as error:
        print(type(error).__name__, error.status_code, error)
```

返回状态的调用(`link_clusters`、`unlink_clusters`、`CacheTask.synchronize`)返回
同样的状态码。

本页由 `python scripts/make_errors_page.py` 从 `LLMStatusCode` 生成,它是代码中唯一的状态码表,
程序也可以读取:`LLMStatusCode.LLM_TIMEOUT.meaning`、`.remedy` 和 `.causes`(英文)。
"""

SECTION = """
## {code}

{meaning}值为 {value}。

以 {name} 抛出,它同时也是 {builtin}。

常见原因:

{causes}
解决办法:{remedy}
"""

NO_REMEDY = "按错误文本的说明处理:它给出错误的值、限制和补救办法。"

REFERENCE_ONLY = """
## 本库从不返回的状态码

列在表中,因为为参考接口编写的程序会用到它们的名字。

| 状态码 | 值 | 含义 |
|---|---|---|
"""

TEXTS = {
    # LLM_FAILED
    "the call failed for a reason without a code of its own": "调用失败,原因没有专门的状态码",
    "the instance is finalized, or this is a forked child of its process": (
        "实例已 finalize,或当前是其进程 fork 出的子进程"
    ),
    "an address to listen at can't be bound": "监听地址无法绑定",
    "no file descriptors are left": "文件描述符已用完",
    "a peer sent what can't be true": "对端发来不可能正确的内容",
    "an engine (HIXL, NIXL) failed": "引擎(HIXL、NIXL)失败",
    # LLM_WAIT_PROCESS_TIMEOUT
    "waiting for the request took too long": "等待请求的时间过长",
    # LLM_KV_CACHE_NOT_EXIST
    "there is no such cache, or no such key": "没有这个缓存,或没有这个键",
    "check the key, and that its owner has neither freed nor unregistered the cache": (
        "检查键,并确认拥有者没有释放或注销该缓存"
    ),
    "a name or key that its owner does not have (yet)": "拥有者(还)没有这个名字或键",
    "a request key that a pull has consumed": "请求键已被一次拉取消耗",
    "a cache that was freed or unregistered, on either side": "缓存已被任一侧释放或注销",
    "a cache whose owner keeps it from peers": "拥有者不允许对端访问该缓存",
    # LLM_REPEAT_REQUEST, LLM_REQUEST_ALREADY_COMPLETED
    "the request was made before": "请求已经发起过",
    "the request is complete already": "请求已经完成",
    # LLM_PARAM_INVALID
    "an argument is invalid, or arguments contradict each other": "参数无效,或参数互相矛盾",
    "block or row ids out of range, duplicate destination blocks": ("块号或行号越界,目的块重复"),
    "an empty layer range": "层范围为空",
    "two caches with other block sizes, tensor counts or dtypes": (
        "两个缓存的块大小、张量个数或 dtype 不同"
    ),
    "an option that there is not, a wrong value of one, or two peers with other modes": (
        "选项不存在或取值错误,或两端的模式不同"
    ),
    "registered addresses that are not mapped, or not on that device": (
        "注册的地址没有映射,或不在该设备上"
    ),
    # LLM_ENGINE_FINALIZED
    "the instance is finalized": "实例已 finalize",
    "call init() first": "先调用 init()",
    # LLM_NOT_YET_LINK
    "there is no usable link to that peer": "没有可用的到该对端的链路",
    "link to the peer first, and look at the status that link_clusters() returned": (
        "先链接对端,并检查 link_clusters() 返回的状态"
    ),
    "no link was made, or a side has unlinked": "没有建立链路,或一侧已断开",
    "the peer's process has ended, or its host does not answer any more": (
        "对端进程已结束,或其主机不再响应"
    ),
    "the link was lost, and it is the peer that has to dial again": (
        "链路已丢失,且应由对端重新发起连接"
    ),
    # LLM_ALREADY_LINK
    "there is a link to that peer already": "到该对端的链路已经存在",
    "unlink it first": "先断开它",
    "link_clusters() for a peer that is linked": "对已链接的对端调用 link_clusters()",
    "another instance with the same cluster id is linked": "已链接另一个 cluster id 相同的实例",
    # LLM_LINK_FAILED
    "the link could not be made": "链路无法建立",
    "check that the peer is initialised, and listens on the address given": (
        "确认对端已初始化,并在所给地址上监听"
    ),
    "nobody listens at the address": "该地址上没有监听者",
    "the two sides have other versions of this library": "两侧的本库版本不同",
    "the link secrets differ, or only one side has one": "链路密钥不同,或只有一侧设置了密钥",
    # LLM_UNLINK_FAILED
    "the link could not be taken down in agreement with the peer": "无法与对端协商断开链路",
    "unlink with force=True on both sides": "两侧都以 force=True 断开",
    "unlinking without force, and the peer is gone": "没有使用 force 断开,而对端已消失",
    # LLM_NOTIFY_PROMPT_UNLINK_FAILED to LLM_PROCESSING_LINK
    "the peer could not be told of the unlink": "无法把断开通知对端",
    "too many clusters in one call": "一次调用中的 cluster 过多",
    "the link is being made": "链路正在建立",
    "try again later": "稍后重试",
    # LLM_DEVICE_OUT_OF_MEMORY
    "the device has no memory left for this": "设备没有足够的内存",
    "the Ascend runtime had no memory for a call": "昇腾运行时没有内存执行某个调用",
    # codes of the reference
    "raise sync_kv_timeout, or find out why the peer is slow": (
        "增大 sync_kv_timeout,或查明对端为何缓慢"
    ),
    "the prefix exists already": "前缀已经存在",
    "there is no such prefix": "没有这个前缀",
    "the sequence is too long": "序列过长",
    "no block is free": "没有空闲块",
    "there is no memory left for blocks": "没有内存可用于块",
    # LLM_EXIST_LINK
    "there are links, and the call needs that there are none": "存在链路,而该调用要求没有链路",
    "unlink every peer first": "先断开所有对端",
    "switch_role() to another address while peers are linked": (
        "仍有已链接的对端时用 switch_role() 切换到另一地址"
    ),
    "switch_role() while a communicator is being linked": "通信域正在建链时调用 switch_role()",
    # LLM_FEATURE_NOT_ENABLED
    "the feature is not enabled, or not supported here": "功能未启用,或此处不支持",
    "a transport that this machine or the peer does not have": "本机或对端没有这个 transport",
    "an NPU that torch_npu can't use": "torch_npu 无法使用的 NPU",
    "a package of an extra (secret, nixl, metrics, tracing, plots) is not installed": (
        "可选依赖(secret、nixl、metrics、tracing、plots)的包没有安装"
    ),
    # LLM_TIMEOUT
    "the call did not finish in its time": "调用没有在限定时间内完成",
    "give it more time, or find out why the peer is slow or gone": (
        "给它更多时间,或查明对端为何缓慢或消失"
    ),
    "the peer is stopped, overloaded, or behind a slow connection": (
        "对端已停止、过载,或网络连接缓慢"
    ),
    "a time limit that is too short for the bytes": "对于数据量来说时限过短",
    "a synchronizer that never lets a layer go": "synchronizer 始终不放行某一层",
    # LLM_LINK_BUSY
    "the link is in use by another call": "链路正被另一个调用使用",
    "unlinking while the peer moves bytes on the link": "对端正在链路上传输数据时断开",
    "another pull of the same request key is under way": "对同一请求键的另一次拉取正在进行",
    "more leases or requests of one peer than an instance takes": (
        "一个对端的租约或请求超过实例所能接受的数量"
    ),
    "a peer may still write to memory that finalize() should give back": (
        "对端可能仍在写入 finalize() 应当归还的内存"
    ),
    # LLM_OUT_OF_MEMORY
    "there is no memory left for this": "没有足够的内存",
    "free caches, or configure a larger pool": "释放缓存,或配置更大的内存池",
    "a pool that is too small, or in pieces": "内存池过小,或已碎片化",
    "the container's or the machine's limit": "容器或机器的限额",
    "the device is full": "设备内存已满",
    # LLM_DEVICE_MEM_ERROR
    "the device reported a memory error": "设备报告内存错误",
    "the device's driver or memory failed": "设备的驱动或内存故障",
    "a forked child uses an NPU that its parent has used": (
        "fork 出的子进程使用了父进程用过的 NPU"
    ),
    # LLM_SUSPECT_REMOTE_ERROR
    "the peer, or the way to it, is suspected to be broken": "怀疑对端或到它的路径已损坏",
    "unlink with force=True, and link again once the peer is back": (
        "以 force=True 断开,等对端恢复后重新链接"
    ),
    "the Ascend runtime reports that a peer's device does not answer": (
        "昇腾运行时报告对端的设备没有响应"
    ),
    # LLM_UNKNOWN_ERROR
    "unknown error": "未知错误",
    "an exception of the program's own, such as its synchronizer's, ended a background task": (
        "程序自身的异常(例如 synchronizer 抛出的)结束了后台任务"
    ),
}
